"""597 real and broken files, and thousands of mutants: each ends as a picture or as our own error, at bounded cost."""

import csv
import io
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fedscan_client.intake import decode, read
from fedscan_client.intake.records import Refused
from fedscan_client.intake.render import render
from fedscan_client.intake.stack import assemble
from fedscan_core.errors import FedscanError

DICOM = Path(__file__).parents[4] / "shared/data/dicom"
pytestmark = [
    pytest.mark.skipif(not DICOM.exists(), reason="the DICOM collection is not beside the repository"),
    pytest.mark.filterwarnings("ignore"),
]

# The index says what pydicom and pylibjpeg did. Where we do something else, and why:
BETTER = {  # they fail there
    "pydicom/JPEG-lossy.dcm": "JPEG of 12 bits",
    "wg04/MR1_JPLY.dcm": "JPEG of 12 bits",
    "wg04/MR3_JPLY.dcm": "JPEG of 12 bits",
    "wg04/XA1_JPLY.dcm": "JPEG of 12 bits",
    "pydicom/liver_rle.dcm": "RLE of 1 bit",
    "pydicom/liver_nonbyte_aligned_rle.dcm": "RLE of 1 bit",
    "pydicom/liver_deflate.dcm": "deflated frames",
    "pydicom/liver_nonbyte_aligned_deflate.dcm": "deflated frames",
}
STRICTER = {"broken/photometric_lies.dcm": "colour"}  # it says RGB and holds one sample
REASONS = {  # the broken ones that are DICOM, each by its name
    "bits_allocated_12": "bit_layout",
    "claims_17_exabytes": "too_large",
    "rows_too_many": "pixels_undecodable",
    "rows_zero": "bad_header",
    "truncated_in_pixels": "pixels_undecodable",
    "empty_pixel_data": "no_pixels",
    "unknown_transfer_syntax": "transfer_syntax",
}


def rows(folder=""):
    with (DICOM / "metadata.csv").open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["file"].startswith(folder)]


def outcome(path):
    """("ok", shape and type) or ("refused", reason); anything else is a failure of the test."""
    data = path.read_bytes()
    try:
        read.header(io.BytesIO(data), len(data))
        values = decode.frames(read.whole(io.BytesIO(data), len(data)))
    except Refused as refused:
        return "refused", refused.reason
    return "ok", f"{'x'.join(map(str, values.shape[len(values) == 1 :]))} {values.dtype}"


def check(row):
    """One file against its line of the index."""
    name, label = row["file"], row["label"]
    kind, what = outcome(DICOM / name)
    if label in ("unreadable", "readable_with_force"):
        assert (kind, what) == ("refused", "not_dicom"), name
    elif label == "no_pixels":
        assert (kind, what) == ("refused", "no_pixels"), name
    elif name in STRICTER:
        assert (kind, what) == ("refused", STRICTER[name])
    elif label == "ok":
        assert kind == "ok", (name, what)
        if row["photometric"] != "PALETTE COLOR" and row["bits"] != "1":
            shape, dtype = row["pixels"].split()  # big endian stands there as >i2
            assert what == f"{shape} {np.dtype(dtype).newbyteorder('=')}", name
    elif name in BETTER:
        assert kind == "ok", (name, what)
    else:
        assert kind == "refused", name
        assert what == REASONS.get(Path(name).stem, what), name


def test_the_broken_ones_end_as_the_index_says():
    broken = rows("broken/")
    assert len(broken) == 49
    for row in broken:
        check(row)


_ALL = """
import json, sys
sys.path.insert(0, sys.argv[1])
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("collection", sys.argv[2])
module = module_from_spec(spec); spec.loader.exec_module(module)
failed = []
for row in module.rows():
    try:
        module.check(row)
    except BaseException as error:
        failed.append(f"{row['file']}: {error!r}"[:300])
from fedscan_client.intake import decoders
peaks = [  # not getrusage: a new process starts with its parent's peak
    int(open(f"/proc/{process}/status").read().split("VmHWM:")[1].split()[0]) // 1024
    for process in ("self", decoders._child[1].pid)
]
print(json.dumps({"files": len(module.rows()), "failed": failed, "peaks": peaks}))
"""


def test_all_of_them_in_less_than_a_gigabyte():
    done = subprocess.run(
        [sys.executable, "-c", _ALL, str(Path(__file__).parent), __file__], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["failed"] == [] and found["files"] == 597
    assert sum(found["peaks"]) < 1024, found  # MiB, ours and the decoders'


SEEDS = (  # small files of every coding and structure
    "pydicom/CT_small.dcm",
    "pydicom/MR_small.dcm",
    "pydicom/MR_small_RLE.dcm",
    "pydicom/MR_small_bigendian.dcm",
    "pydicom/MR_small_implicit.dcm",
    "pydicom/MR_small_jp2klossless.dcm",
    "pydicom/MR_small_jpeg_ls_lossless.dcm",
    "pydicom/JPGLosslessP14SV1_1s_1f_8b.dcm",
    "pydicom/JPGExtended.dcm",
    "pydicom/SC_rgb_jpeg_dcmtk.dcm",
    "pydicom/SC_rgb_small_odd_jpeg.dcm",
    "pydicom/SC_rgb_jls_lossy_sample.dcm",
    "pydicom/SC_rgb_rle_2frame.dcm",
    "pydicom/SC_rgb_gdcm_KY.dcm",
    "pydicom/J2K_pixelrep_mismatch.dcm",
    "pydicom/JPEG2000.dcm",
    "pydicom/JPEG-LL.dcm",
    "pydicom/image_dfl.dcm",
    "pydicom/parametric_map_float.dcm",
    "pydicom/liver_1frame.dcm",
    "pydicom/liver_nonbyte_aligned_rle.dcm",
    "pydicom/examples_palette.dcm",
    "pydicom/emri_small_jpeg_ls_lossless.dcm",
    "pydicom/rtdose_rle.dcm",
    "pydicom/mlut_18.dcm",
    "pydicom/HTJ2K_08_RGB.dcm",
    "pydicom/SC_rgb_jpeg_gdcm.dcm",
    "dcmqi/segmentations/24x38x3/multiframe/mf.dcm",
    "broken/nested_300_deep.dcm",
    "broken/sequence_5000_empty_items.dcm",
)
_TAGS = [b"\x28\0" + element.to_bytes(2, "little") for element in (2, 4, 6, 8, 16, 17, 0x100, 0x101, 0x103)]


def mutated(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """One to eight changes: flipped bits, spoilt lengths and numbers, swapped tags, cuts, doubled parts, splices."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        if len(out) < 200:
            break
        kind = rng.randrange(9)
        pixels = max(out.rfind(b"\xe0\x7f\x10\0"), out.rfind(b"\x7f\xe0\0\x10"), 140)
        start, width = rng.choice(
            ((128, len(out)), (128, pixels), (pixels, 150), (pixels, 150), (pixels, len(out) - pixels))
        )
        where = min(start + rng.randrange(max(1, width)), len(out) - 9)
        if kind == 0:
            out[where] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[where : where + 4] = rng.choice(
                (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xf0\xff\xff\x7f", rng.randbytes(4))
            )
        elif kind == 2:  # another value in an element that decides about size
            tag = rng.choice(_TAGS)
            at = out.find(tag, 128)
            if at > 0:
                out[at + 8 : at + 10] = rng.choice(
                    (b"\xff\xff", b"\0\0", b"\1\0", b"\x08\0", b"\x10\0", rng.randbytes(2))
                )
        elif kind == 3:  # an element becomes another one
            at, to = out.find(rng.choice(_TAGS), 128), rng.choice(_TAGS)
            if at > 0:
                out[at : at + 4] = to
        elif kind == 4:
            del out[where:]
        elif kind == 5:
            del out[where : where + rng.randrange(1, 40)]
        elif kind == 6:
            out[where:where] = out[where : where + rng.randrange(1, 300)]
        elif kind == 7:
            at = rng.randrange(len(other))
            out[where : where + 200] = other[at : at + rng.randrange(1, 400)]
        else:
            out[where : where + 2] = rng.choice(
                (b"SQ", b"OB", b"OW", b"UN", b"US", b"\xfe\xff", b"\xff\xd8", b"\xff\x4f")
            )
    return bytes(out)


def walk(data: bytes) -> str:
    """All of the way of one file: header, whole, frames, volume, picture."""
    try:
        read.header(io.BytesIO(data), len(data))
        ds = read.whole(io.BytesIO(data), len(data))
        ds.add_new("PatientID", "LO", "A")  # some seeds have none, which would be the end of the way
        ds.add_new("SeriesInstanceUID", "UI", "1.2")
        for volume, _ in assemble([ds]):
            image = render(volume, window="header", size=(16, 16), channels=1)
            assert image.min() >= 0 and image.max() <= 1
    except FedscanError as error:
        return getattr(error, "reason", "error")
    return "ok"


@pytest.mark.parametrize("count", [1000, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_no_mutated_file_ends_in_anything_but_a_picture_or_our_error(count):
    seeds = [(DICOM / name).read_bytes() for name in SEEDS]
    if count == 1000:
        seeds = [seed for seed in seeds if len(seed) < 100_000]
    ends: dict[str, int] = {}
    slowest = 0.0
    for number in range(count):
        rng = random.Random(number)
        data = mutated(rng.choice(seeds), rng.choice(seeds), rng)
        start = time.perf_counter()
        try:
            end = walk(data)
        except BaseException as error:
            pytest.fail(f"seed {number}: {error!r}")
        slowest = max(slowest, time.perf_counter() - start)
        ends[end] = ends.get(end, 0) + 1
    assert slowest < 15, ends  # seconds; a decoder's alarm rings after 10
    assert ends["ok"] > count / 10 and len(ends) >= 6, ends  # the changes are neither all fatal nor all harmless
    print(ends, round(slowest, 2))
