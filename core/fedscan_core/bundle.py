"""The one bundle that our coordinator starts and our sites accept: two text files and not a line of code.

Flower calls it a FAB (Flower App Bundle, `flwr/cli/build.py` of 1.41.0): a zip of `pyproject.toml` and the list
`.info/CONTENT`. It names the installed ServerApp and ClientApp, and has one key of configuration, the run's id;
everything else about a run travels in its signed order. Its bytes are the same on every machine (stored, not
compressed; fixed date and mode), so a site compares them with its own and looks at nothing else.
"""

import hashlib
import io
import zipfile

PUBLISHER, NAME, VERSION = "fedscan", "fedscan-run", "1.0.0"
SERVERAPP, CLIENTAPP = "fedscan_server.deployed:app", "fedscan_client.app:app"
RUN_KEY = "fedscan-run"  # run_config: the run's id
APP_ID = f"{PUBLISHER}/{NAME}"  # what Flower calls a run's fab_id

PROJECT = f"""\
[project]
name = "{NAME}"
version = "{VERSION}"
dependencies = []

[tool.flwr.app]
publisher = "{PUBLISHER}"

[tool.flwr.app.components]
serverapp = "{SERVERAPP}"
clientapp = "{CLIENTAPP}"

[tool.flwr.app.config]
{RUN_KEY} = ""
"""

_DATE = (2024, 10, 1, 0, 0, 0)  # FAB_DATE of Flower


def pack(files: dict[str, bytes]) -> bytes:
    """A zip with the same bytes whenever and wherever it is made: files in the order given, stored."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name, _DATE)
            info.create_system, info.external_attr = 3, 0o600 << 16  # else they are the machine's
            archive.writestr(info, data)
    return buffer.getvalue()


def listing(files: dict[str, bytes]) -> bytes:
    """Flower's `.info/CONTENT`: name, SHA-256 and length in bits of each file."""
    lines = (f"{name},{hashlib.sha256(data).hexdigest()},{8 * len(data)}" for name, data in files.items())
    return "\n".join(lines).encode()


_FILES = {"pyproject.toml": PROJECT.encode()}

CONTENT: bytes = pack({**_FILES, ".info/CONTENT": listing(_FILES)})
SHA256: str = hashlib.sha256(CONTENT).hexdigest()
