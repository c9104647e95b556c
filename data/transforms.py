"""From JPEG bytes to pixels: pure functions of bytes and a key."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

import numpy as np

from data.errors import InputError
from data.plan import Purpose, draw, uniform

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    from data.batches import ImageTransform

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_MAX_ANGLE = 45.0
_MAX_SHIFT = 0.15
_SCALES = (0.85, 1.15)


def decode_grey(jpeg: bytes, short_side: int) -> Image.Image:
    """A JPEG as a grey image whose short side is `short_side` (bilinear, aspect kept).

    Raises:
        InputError: The bytes are no readable image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(jpeg))
        grey = image.convert("L")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise InputError(
            f"image bytes cannot be decoded ({error}); extract the cohort again"
        ) from None
    width, height = grey.size
    if min(width, height) == short_side:
        return grey
    if width < height:
        size = (short_side, int(short_side * height / width))
    else:
        size = (int(short_side * width / height), short_side)
    return grey.resize(size, Image.Resampling.BILINEAR)


def centre_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The [size, size] centre; black where the image is smaller."""
    left, top = _centre(image.width, size), _centre(image.height, size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def augment(
    image: Image.Image, transform: ImageTransform, *, seed: int, epoch: int, row: int
) -> NDArray[np.uint8]:
    """Flip, affine and crop of training in one warp: [size, size] uint8, black outside.

    Flip with p = 0.5; rotation within +-45 degrees, translation within 15 %, scale 0.85-1.15,
    shear as configured, nearest pixel (the MedFuse authors' released transforms). The draws are
    keyed by (seed, epoch, row), so they depend on no worker and no order.
    """
    from PIL import Image

    u = uniform(draw(seed, Purpose.AUGMENT, epoch, row, 8))
    width, height = image.size
    matrix = inverse_affine(
        centre=(width / 2, height / 2),
        angle=(2 * u[0] - 1) * _MAX_ANGLE,
        shift=(
            round((2 * u[1] - 1) * _MAX_SHIFT * width),
            round((2 * u[2] - 1) * _MAX_SHIFT * height),
        ),
        scale=_SCALES[0] + u[3] * (_SCALES[1] - _SCALES[0]),
        shear=(2 * u[4] - 1) * transform.shear,
    )
    size = transform.size
    if transform.crop == "random":
        left, top = _corner(width, size, u[5]), _corner(height, size, u[6])
    else:
        left, top = _centre(width, size), _centre(height, size)
    a, b, c, d, e, f = matrix
    c, f = c + a * left + b * top, f + d * left + e * top
    if u[7] < 0.5:
        a, b, c = -a, -b, width - c
    warped = image.transform(
        (size, size), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.NEAREST
    )
    return np.asarray(warped)


def inverse_affine(
    *,
    centre: tuple[float, float],
    angle: float,
    shift: tuple[int, int],
    scale: float,
    shear: float,
) -> tuple[float, float, float, float, float, float]:
    """The map from output to input pixels of shear along x, rotation, scaling and translation.

    Forward, about the centre: x' = scale * R(angle) * [[1, -tan(shear)], [0, 1]] * x + shift, in
    degrees, clockwise as seen (y points down). The six numbers are the rows of the inverse.
    """
    turn, slant = math.radians(angle), math.tan(math.radians(shear))
    cos, sin = math.cos(turn), math.sin(turn)
    a, b = (cos - slant * sin) / scale, (sin + slant * cos) / scale
    d, e = -sin / scale, cos / scale
    x, y = -centre[0] - shift[0], -centre[1] - shift[1]
    return (a, b, a * x + b * y + centre[0], d, e, d * x + e * y + centre[1])


def pixels(
    jpeg: bytes, transform: ImageTransform, key: tuple[int, int, int] | None
) -> NDArray[np.uint8]:
    """[size, size] uint8 of one JPEG; augmented if a key (seed, epoch, row) is given."""
    image = decode_grey(jpeg, transform.resize)
    if key is None or not (transform.augment or transform.crop == "random"):
        return centre_crop(image, transform.size)
    seed, epoch, row = key
    return augment(image, transform, seed=seed, epoch=epoch, row=row)


def _centre(length: int, size: int) -> int:
    return round((length - size) / 2)


def _corner(length: int, size: int, u: float) -> int:
    return int(u * (length - size + 1)) if length > size else _centre(length, size)
