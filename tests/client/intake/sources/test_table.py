from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedscan_client.intake.pictures import load_image
from fedscan_client.intake.sources.table import read_table, row_path
from fedscan_core.errors import DataError

SHARED = Path(__file__).parents[4] / "../shared/data"


@pytest.fixture
def table(tmp_path):
    """Writes metadata.csv beside a.png, b.png and c.npz (3 images)."""
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / name)
    np.savez(tmp_path / "c.npz", images=np.zeros((3, 4, 4), np.uint8))

    def write(text):
        (tmp_path / "metadata.csv").write_text(text, encoding="utf-8")
        return tmp_path / "metadata.csv"

    return write


def test_a_table_with_everything(table):
    path = table(
        "\ufefffile,index,patient_id,label,site,split,sex,age,view,note\r\n"
        'a.png,,P1,1,north,train,F,63,PA,"a, quoted ""note"""\r\n'
        "c.npz,2,P2,0,,,,,,\r\n"
        "\r\n,,,,,,,,,\r\n"
    )
    first, second = read_table(path)
    assert (first.file, first.index, first.patient_id, first.label) == ("a.png", None, "P1", "1")
    assert (first.site, first.split, first.sex, first.age) == ("north", "train", "F", "63")
    assert first.extra == {"view": "PA", "note": 'a, quoted "note"'}
    assert second.index == 2 and second.split == second.sex == ""
    assert row_path(path, first) == path.parent / "a.png"


HEAD = "file,index,patient_id,label,split\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no column 'file'."),
        ("file;patient_id;label\n", "no column 'file'."),
        ("file,label\na.png,1\n", "no column 'patient_id'."),
        ("file,patient_id,label,file\n", "twice"),
        (HEAD, "no rows"),
        (HEAD + "a.png,,,1,\n", "Line 2 of metadata.csv has no patient_id"),
        (HEAD + "a.png,,P,,\n", "no label"),
        (HEAD + "a.png,,P,1\n", "4 values"),
        (HEAD + "a.png,,P,1,validation\n", "'validation'"),
        (
            HEAD + "x.png,,P,1,\na.png,,P,1,\ny.png,,P,1,\n",
            "2 file(s) that do not exist, first 'x.png'",
        ),
        (HEAD + "../a.png,,P,1,\n", "outside"),
        (HEAD + "/etc/hosts,,P,1,\n", "outside"),
        (HEAD + "c.npz,3,P,1,\n", "index 3 of c.npz, which holds 3"),
        (HEAD + "c.npz,-1,P,1,\n", "'-1'"),
        (HEAD + "c.npz,1.0,P,1,\n", "'1.0'"),
        (HEAD + "c.npz,,P,1,\n", "an npz file needs one"),
        (HEAD + "a.png,0,P,1,\n", "belongs to an npz file"),
        (HEAD + "a.png,,P,1,\nb.png,,P,1,\na.png,,Q,0,\n", "a.png twice"),
        (HEAD + "c.npz,1,P,1,\nc.npz,01,P,1,\n", "c.npz index 1 twice"),
        (HEAD + "a.png,,P,1,train\nb.png,,P,1,test\n", "two splits"),
        (HEAD + '"a.png,,P,1,\n', "not a valid CSV"),
    ],
)
def test_every_bad_table_is_one_clear_error(table, text, says):
    with pytest.raises(DataError) as caught:
        read_table(table(text))
    assert says in caught.value.message and caught.value.remedy


def test_a_table_without_a_header_line_does_not_print_its_first_patient(table):
    with pytest.raises(DataError) as caught:
        read_table(table("a.png,CANARY-4711,1\nb.png,P2,0\n"))
    assert "CANARY" not in str(caught.value) + caught.value.remedy


def test_missing_table_links_out_and_npz_without_images(table, tmp_path_factory):
    path = table(HEAD + "out.png,,P,1,\n")
    with pytest.raises(DataError, match="cannot be read"):
        read_table(path.parent / "none.csv")
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "secret.png"
    elsewhere.write_bytes(b"")
    (path.parent / "out.png").symlink_to(elsewhere)
    with pytest.raises(DataError, match="outside"):
        read_table(path)
    np.savez(path.parent / "d.npz", pictures=np.zeros((3, 4, 4), np.uint8))
    with pytest.raises(DataError, match="no array 'images'"):
        read_table(table(HEAD + "d.npz,0,P,1,\n"))
    path.write_bytes("file,patient_id,label\na.png,Jürgen,1\n".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        read_table(path)


@pytest.mark.parametrize(
    ("file", "rows"),
    [
        ("cxr/metadata.csv", 3015),
        ("large2d/pneumonia_metadata.csv", 5808),
        ("large2d/malaria_metadata.csv", 12000),
    ],
)
def test_public_tables_load(file, rows):
    path = SHARED / file
    if not path.exists():
        pytest.skip(f"the sample data {file} is not on this machine")
    table = read_table(path)
    assert len(table) == rows and all(row.site and row.split for row in table)
    sample = table[:: rows // 200]
    images = [load_image(row_path(path, r), r.index, size=(64, 64), channels=1) for r in sample]
    assert all(image.shape == (1, 64, 64) and 0 <= image.min() < image.max() <= 1 for image in images)
