"""The one bundle: the same bytes everywhere, no code in it, and Flower reads it."""

import hashlib
import io
import zipfile

from fedscan_core import bundle

# A change of the bundle is a change of the protocol: sites of the version before refuse it. Then this line changes too.
KNOWN = "709812c7fe6325683a8b940921707fc8995f190bc2be54f0732f4f02bc7e0962"


def test_its_bytes_are_those_of_every_other_machine():
    assert bundle.SHA256 == KNOWN == hashlib.sha256(bundle.CONTENT).hexdigest()


def test_it_holds_two_text_files_and_no_code():
    with zipfile.ZipFile(io.BytesIO(bundle.CONTENT)) as archive:
        assert archive.namelist() == ["pyproject.toml", ".info/CONTENT"]
        assert archive.read("pyproject.toml").decode() == bundle.PROJECT
        name, digest, bits = archive.read(".info/CONTENT").decode().split(",")
    assert (name, digest) == ("pyproject.toml", hashlib.sha256(bundle.PROJECT.encode()).hexdigest())
    assert int(bits) == 8 * len(bundle.PROJECT)


def test_flower_reads_it():
    from flwr.cli.config_utils import get_fab_metadata
    from flwr.common.config import get_fab_config, validate_config

    told = get_fab_config(bundle.CONTENT)
    sound, errors, _ = validate_config(told, check_module=False)
    assert sound, errors
    assert get_fab_metadata(bundle.CONTENT) == (bundle.APP_ID, bundle.VERSION)
    app = told["tool"]["flwr"]["app"]
    assert app["components"] == {"serverapp": bundle.SERVERAPP, "clientapp": bundle.CLIENTAPP}
    assert app["config"] == {bundle.RUN_KEY: ""}
    assert told["project"]["dependencies"] == []


def test_packing_does_not_depend_on_the_machine(monkeypatch):
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert bundle.pack({"a": b"x"}) == bundle.pack({"a": b"x"})
    with zipfile.ZipFile(io.BytesIO(bundle.pack({"a": b"x"}))) as archive:
        (info,) = archive.infolist()
    assert (info.create_system, info.compress_type, info.date_time[0]) == (3, zipfile.ZIP_STORED, 2024)
