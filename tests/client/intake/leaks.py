"""Looks for planted names, ids and rows of pixels in everything below a folder: contents, and names of files.

    leaks(folder, needles) -> what was found and where; [] is what a test wants

A needle is looked for as it is (any case), in UTF-16 of both byte orders, in hex, in base64 at its three offsets, and
all of that also inside gzip, zlib, zip and base64 that a file holds. Needles shorter than 6 bytes are refused: they
occur by chance. A row of pixels should have 16 bytes or more.
"""

import base64
import contextlib
import io
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

_DEPTH = 3  # an archive in an archive
_BASE64 = re.compile(rb"[A-Za-z0-9+/_\-\r\n]{24,}={0,2}")


def leaks(folder: Path, needles: Iterable[bytes]) -> list[str]:
    """One text, "needle in file", for each needle that some file shows."""
    forms = {needle: _forms(needle) for needle in needles}
    assert forms, "nothing to look for"
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        texts = [name.encode(), *(_inside(path.read_bytes()) if path.is_file() else ())]
        texts = [text.lower() for text in texts] + texts  # upper and lower case
        found += [f"{needle!r} in {name}" for needle, shapes in forms.items() if _any(shapes, texts)]
    return found


def _any(shapes: set[bytes], texts: list[bytes]) -> bool:
    return any(shape in text for text in texts for shape in shapes)


def _forms(needle: bytes) -> set[bytes]:
    assert len(needle) >= 6, f"{needle!r} is too short: it occurs by chance"
    plain = {needle, needle.lower()}
    with contextlib.suppress(UnicodeDecodeError):
        plain |= {form.decode().encode(order) for form in set(plain) for order in ("utf-16-le", "utf-16-be")}
    shapes = plain | {needle.hex().encode()}
    for shift in range(3):  # the letters of base64 that depend on the needle alone
        text = base64.b64encode(bytes(shift) + needle)
        inner = text[-(-shift * 8 // 6) : -4]
        if len(inner) >= 8:
            shapes.add(inner)
    return shapes


def _inside(data: bytes, depth: int = _DEPTH) -> Iterator[bytes]:
    """The bytes, and what is packed in them."""
    yield data
    if not depth:
        return
    if data[:2] == b"PK" or b"PK\x05\x06" in data[-70_000:]:
        broken = contextlib.suppress(zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error, EOFError)
        with broken, zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in archive.namelist():
                yield name.encode()
                yield from _inside(archive.read(name), depth - 1)
    for start in {found.start() for found in re.finditer(rb"\x1f\x8b\x08|\x78[\x01\x5e\x9c\xda]", data)}:
        with contextlib.suppress(zlib.error):
            unpacked = zlib.decompressobj(wbits=47).decompress(data[start:], 1 << 24)
            if len(unpacked) >= 4:
                yield from _inside(unpacked, depth - 1)
    for run in _BASE64.findall(data) if len(data) < 1 << 22 else ():
        letters = re.sub(rb"[\r\n]", b"", run).rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
        for start in range(4):  # letters by chance in front of it
            part = letters[start:]
            part = part[: len(part) - (len(part) % 4 == 1)]
            yield from _inside(base64.b64decode(part + b"=" * (-len(part) % 4)), depth - 1)
