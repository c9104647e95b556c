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


def pixels(
    jpeg: bytes, transform: ImageTransform, key: tuple[int, int, int] | None
) -> NDArray[np.uint8]:
    """[size, size] uint8 of one JPEG; the centre, or as in training if a key is given.

    The key (seed, epoch, row) is all that the draws of training depend on.
    """
    image = decode_grey(jpeg, transform.resize)
    size = transform.size
    corner = (_centre(image.width, size), _centre(image.height, size))
    if key is None:
        return crop(image, corner, size)
    u = uniform(draw(key[0], Purpose.AUGMENT, key[1], key[2], 8))
    if transform.crop == "random":
        corner = (_corner(image.width, size, u[5]), _corner(image.height, size, u[6]))
    if not transform.augment:
        return crop(image, corner, size)
    return augment(image, transform, corner, u)


def crop(image: Image.Image, corner: tuple[int, int], size: int) -> NDArray[np.uint8]:
    """The [size, size] window at (left, top); black where the image is smaller."""
    left, top = corner
    return np.asarray(image.crop((left, top, left + size, top + size)))


def augment(
    image: Image.Image, transform: ImageTransform, corner: tuple[int, int], u: NDArray[np.float64]
) -> NDArray[np.uint8]:
    """Flip, affine and crop of training in one warp: [size, size] uint8, black outside.

    Flip with p = 0.5; rotation within +-45 degrees, translation within 15 %, scale 0.85-1.15,
    shear as configured, nearest pixel (the MedFuse authors' released transforms).

    Args:
        image: Grey.
        transform: Size of the crop and range of the shear.
        corner: Left and top of the crop, after the affine map.
        u: Eight draws in [0, 1).
    """
    from PIL import Image

    width, height = image.size
    a, b, c, d, e, f = inverse_affine(
        centre=(width / 2, height / 2),
        angle=(2 * u[0] - 1) * _MAX_ANGLE,
        shift=(
            round((2 * u[1] - 1) * _MAX_SHIFT * width),
            round((2 * u[2] - 1) * _MAX_SHIFT * height),
        ),
        scale=_SCALES[0] + u[3] * (_SCALES[1] - _SCALES[0]),
        shear=(2 * u[4] - 1) * transform.shear,
    )
    left, top = corner
    c, f = c + a * left + b * top, f + d * left + e * top
    if u[7] < 0.5:
        a, b, c = -a, -b, width - c
    size = (transform.size, transform.size)
    matrix = (a, b, c, d, e, f)
    return np.asarray(
        image.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)
    )


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


def _centre(length: int, size: int) -> int:
    return round((length - size) / 2)


def _corner(length: int, size: int, u: float) -> int:
    return int(u * (length - size + 1)) if length > size else _centre(length, size)
