"""PNG, JPEG and npz images to float32 [C, H, W] in [0, 1], looking at nothing but the one image.

Scaling uses the range of the data type, never a mean or a maximum over patients, which would be a query on private
data. Aspect ratio is kept: the image is resized to fit and centred on black. Shrinking averages areas (antialiased),
enlarging is bilinear, and an image that already has the size comes through bit for bit.
"""

import functools
import io
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedscan_core.errors import DataError

Channels = Literal[1, 3]

MAX_PIXELS = 2**26  # 67 million: larger than any radiograph, small enough to hold in memory
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def load_image(
    path: Path, index: int | None = None, *, size: tuple[int, int], channels: Channels
) -> NDArray[np.float32]:
    """Loads one image of a research table.

    Args:
        path: PNG, JPEG or npz (key `images`: [N, H, W] or [N, H, W, C]).
        index: row of the npz; None for PNG and JPEG.
        size: (rows, columns) of the result.
        channels: 1 (colour becomes grey by luma) or 3 (grey is repeated). Transparency is laid on
            black.

    Returns:
        float32 [channels, rows, columns] in [0, 1].

    Raises:
        DataError: the file is missing, is not a readable image, or holds values that have no fixed
            range.
    """
    if index is None:
        pixels = _picture(path)
    else:
        images = npz_images(path)
        if not 0 <= index < len(images):
            raise DataError(
                f"{path.name} holds {len(images)} images, not index {index}.",
                remedy="Indices run from 0.",
            )
        pixels = images[index]
    return finish(_unit(pixels, path), size, channels)


def npz_images(path: Path) -> NDArray[Any]:
    """The array `images` of an npz file, [N, H, W] or [N, H, W, C]; kept for the next call.

    Raises:
        DataError: missing, not an npz, without `images`, or of another shape.
    """
    try:
        stat = path.stat()
    except OSError:
        raise DataError(f"{path} does not exist.", remedy="Check the path.") from None
    return _npz_images(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=2)
def _npz_images(path: Path, _mtime: int, _bytes: int) -> NDArray[Any]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not hasattr(archive, "files") or "images" not in archive.files:
                raise DataError(f"{path.name} has no array 'images'.", remedy="Save it with that key.")
            images = np.asarray(archive["images"])
    except DataError:
        raise
    except Exception:  # numpy, zipfile and zlib raise many kinds on a damaged file
        raise DataError(f"{path.name} cannot be read as npz.", remedy="Save it with numpy.savez.") from None
    if images.ndim not in (3, 4) or 0 in images.shape[1:] or images.shape[3:] not in ((), (1,), (3,), (4,)):
        raise DataError(
            f"The images of {path.name} have the shape {images.shape}.",
            remedy="Use [N, H, W] or [N, H, W, C] with 1, 3 or 4 channels.",
        )
    images.setflags(write=False)
    return images


def _picture(path: Path) -> NDArray[Any]:
    """PNG or JPEG as [H, W] or [H, W, C], still in its own data type."""
    try:
        data = path.read_bytes()
    except OSError:
        raise DataError(f"{path} does not exist or cannot be read.", remedy="Check the path.") from None
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError("too large")
            if image.mode in ("L", "RGB", "RGBA") or image.mode.startswith("I;16"):
                return np.asarray(image)
            if image.mode == "I":  # 16-bit grey, as some Pillow versions open it
                return np.asarray(image).astype(np.uint16)
            if image.mode == "1":
                return np.asarray(image.convert("L"))
            transparent = image.mode == "LA" or "transparency" in image.info
            return np.asarray(image.convert("RGBA" if transparent else "RGB"))
    except Exception:  # Pillow's decoders raise many kinds on a damaged file
        raise DataError(
            f"{path.name} is not a readable PNG or JPEG.",
            remedy="Replace it, or remove its row from the table.",
        ) from None


def _unit(pixels: NDArray[Any], path: Path) -> NDArray[np.float32]:
    """[H, W] or [H, W, C] of any supported type to float32 [C, H, W] in [0, 1], without alpha."""
    if pixels.dtype == np.bool_:
        unit = pixels.astype(np.float32)
    elif pixels.dtype.kind == "u" and pixels.dtype.itemsize <= 2:
        unit = pixels.astype(np.float32) / np.float32(255 if pixels.dtype.itemsize == 1 else 65535)
    elif pixels.dtype.kind == "f":
        unit = pixels.astype(np.float32)
        if not (np.isfinite(unit).all() and unit.min() >= 0 and unit.max() <= 1):
            raise DataError(
                f"{path.name} holds real numbers outside [0, 1].",
                remedy="Scale them by a fixed constant.",
            )
    else:
        raise DataError(
            f"{path.name} holds {pixels.dtype} values, which have no fixed range for images.",
            remedy="Use 8-bit or 16-bit unsigned values, or real numbers in [0, 1].",
        )
    if unit.ndim == 2:
        return unit[None]
    if unit.shape[2] == 4:
        unit = unit[:, :, :3] * unit[:, :, 3:]
    return np.ascontiguousarray(unit.transpose(2, 0, 1))


def finish(x_CHW: NDArray[np.float32], size: tuple[int, int], channels: Channels) -> NDArray[np.float32]:
    """[C, h, w] in [0, 1] to [channels, rows, columns]: colour to luma or grey repeated, then `fit`."""
    if channels == 1 and len(x_CHW) == 3:
        x_CHW = np.clip(np.tensordot(_LUMA, x_CHW, 1)[None], 0, 1, dtype=np.float32)
    elif channels == 3 and len(x_CHW) == 1:
        x_CHW = np.repeat(x_CHW, 3, axis=0)
    return fit(x_CHW, size)


def fit(x_CHW: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Resizes [C, h, w] to fit into (rows, columns), keeping the aspect ratio, centred on black."""
    height, width = x_CHW.shape[1:]
    if (height, width) == size:
        return x_CHW
    scale = min(size[0] / height, size[1] / width)
    rows = min(size[0], max(1, round(height * scale)))
    columns = min(size[1], max(1, round(width * scale)))
    method = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR
    out = np.zeros((len(x_CHW), *size), np.float32)
    top, left = (size[0] - rows) // 2, (size[1] - columns) // 2
    for channel, x_HW in enumerate(x_CHW):
        resized = Image.fromarray(np.ascontiguousarray(x_HW)).resize((columns, rows), method)
        out[channel, top : top + rows, left : left + columns] = np.clip(np.asarray(resized), 0, 1)
    return out
