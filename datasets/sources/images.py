"""Reads PNG, JPEG, BMP and WebP as (C, H, W): one channel for grey, three for colour.

Palettes, CMYK and transparent images become RGB; alpha is dropped, the colours below it stay. 16-bit grey stays uint16.
The orientation that a camera noted (EXIF tag 274) is applied. Formats and modes: pillow.readthedocs.io.
"""

from pathlib import Path
from typing import Any

import numpy as np

from datasets.sources.contract import Header, UnusableSource, Volume, library

FORMATS = ["PNG", "JPEG", "BMP", "DIB", "WEBP"]
DTYPES = {"L": np.uint8, "RGB": np.uint8, "I;16": np.uint16, "I;16B": np.uint16, "I": np.int32, "F": np.float32}
KEPT = {"1": "L", "LA": "L", "La": "L", **{mode: mode for mode in DTYPES}}
"""mode of the file -> mode as read; all others become RGB"""
ORIENTATION = 274
SIDEWAYS = (5, 6, 7, 8)


def read_header(files: tuple[Path, ...]) -> Header:
    """Shape and dtype without decoding; the affine is the identity."""
    with _open(files[0]) as image:
        mode = KEPT.get(image.mode, "RGB")
        width, height = image.size
        if _orientation(image) in SIDEWAYS:
            width, height = height, width
        return Header((3 if mode == "RGB" else 1, height, width), np.dtype(DTYPES[mode]), np.eye(4))


def read_volume(files: tuple[Path, ...]) -> Volume:
    """The pixels (C, H, W). UnusableSource for a cut file, an animation, 16-bit colour, or too many pixels."""
    with _open(files[0]) as image:
        mode = KEPT.get(image.mode, "RGB")
        turned = _turned(image, _orientation(image))
        pixels = np.array(turned if turned.mode == mode else turned.convert(mode), DTYPES[mode])
    planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return Volume(np.ascontiguousarray(planes), np.eye(4))


def _open(path: Path) -> Any:
    pillow = library("PIL.Image", "Pillow", "images")
    try:
        image = pillow.open(path, formats=FORMATS)
    except pillow.UnidentifiedImageError as error:
        raise UnusableSource("it is not PNG, JPEG, BMP or WebP, whatever its name says, or its start is cut") from error
    except pillow.DecompressionBombError as error:
        raise UnusableSource(f"too many pixels ({error})") from error
    reason = _reason(image, pillow.MAX_IMAGE_PIXELS)
    if reason:
        image.close()
        raise UnusableSource(reason)
    return image


def _reason(image: Any, limit: int) -> str | None:
    pixels = image.size[0] * image.size[1]
    if pixels > limit:
        return f"its {pixels:,} pixels are more than the {limit:,} that are read of an image; cut it into tiles"
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a camera's JPEG with previews
        return f"it holds {image.n_frames} frames; pick one, or stack them as TIFF"
    if image.format == "PNG" and not image.mode.startswith("I") and any(";16" in str(tile[3]) for tile in image.tile):
        return f"it is {image.mode} of 16 bits, which Pillow cuts to 8; store it as TIFF or .npy"
    return None


def _orientation(image: Any) -> int:
    """The EXIF orientation that stands before the pixels, 1 (upright) to 8; asking for more would decode a PNG."""
    if "exif" not in image.info:
        return 1
    found = library("PIL.Image", "Pillow", "images").Exif()
    found.load(image.info["exif"])
    return int(found.get(ORIENTATION, 1))


def _turned(image: Any, orientation: int) -> Any:
    way = library("PIL.Image", "Pillow", "images").Transpose
    turns = {
        2: way.FLIP_LEFT_RIGHT,
        3: way.ROTATE_180,
        4: way.FLIP_TOP_BOTTOM,
        5: way.TRANSPOSE,
        6: way.ROTATE_270,
        7: way.TRANSVERSE,
        8: way.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image
