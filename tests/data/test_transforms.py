from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as F
from PIL import Image

from data.batches import ImageTransform
from data.collate import images_of
from data.errors import InputError
from data.plan import Purpose, draw, uniform
from data.transforms import crop, decode_grey, inverse_affine, pixels


def _image(width, height, seed=0):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (9, 9), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def _jpeg(image):
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=95)
    return stream.getvalue()


@pytest.mark.parametrize(("width", "height"), [(256, 311), (340, 256), (500, 400), (300, 512)])
def test_evaluation_equals_torchvision(width, height):
    """Resize(256), CenterCrop(224), three channels, ImageNet mean and std."""
    jpeg = _jpeg(_image(width, height))
    grey = pixels(jpeg, ImageTransform(), None)
    reference = T.Compose(
        [
            T.Resize(256),
            T.CenterCrop(224),
            T.Grayscale(3),
            T.ToTensor(),
            T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    expected = reference(Image.open(io.BytesIO(jpeg)))
    found = images_of(torch.from_numpy(grey[None].copy()))[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("place", ["center", "random"])
@pytest.mark.parametrize("shear", [0.0, 10.0])
@pytest.mark.parametrize("size", [(256, 311), (340, 256)])
def test_one_warp_equals_flip_then_affine_then_crop(size, shear, place):
    """The fused warp against the authors' steps by torchvision, with the same draws."""
    image = _image(*size)
    width, height = size
    transform = ImageTransform(shear=shear, crop=place)
    jpeg = _jpeg(image)
    image = decode_grey(jpeg, 256)
    unequal, flips = 0, set()
    for row in range(24):
        found = pixels(jpeg, transform, (1, 2, row))
        u = uniform(draw(1, Purpose.AUGMENT, 2, row, 8))
        step = F.hflip(image) if u[7] < 0.5 else image
        step = F.affine(
            step,
            angle=(2 * u[0] - 1) * 45,
            translate=[
                round((2 * u[1] - 1) * 0.15 * width),
                round((2 * u[2] - 1) * 0.15 * height),
            ],
            scale=0.85 + 0.3 * u[3],
            shear=[(2 * u[4] - 1) * shear, 0.0],
            interpolation=T.InterpolationMode.NEAREST,
        )
        if place == "center":
            expected = np.asarray(F.center_crop(step, [224, 224]))
        else:
            left, top = int(u[5] * (width - 223)), int(u[6] * (height - 223))
            expected = np.asarray(F.crop(step, top, left, 224, 224))
        unequal += int((found != expected).sum())
        flips.add(bool(u[7] < 0.5))
    assert flips == {True, False}
    assert unequal <= 24 * 224 * 224 * 1e-3


def test_the_map_is_the_inverse_of_its_forward_definition():
    centre, shift, angle, scale, shear = (50.0, 40.0), (7, -3), 33.0, 1.1, 8.0
    turn, slant = np.radians(angle), np.tan(np.radians(shear))
    rotate = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    forward = scale * rotate @ np.array([[1, -slant], [0, 1]])
    point = np.array([12.0, 71.0])
    moved = forward @ (point - centre) + centre + shift
    a, b, c, d, e, f = inverse_affine(
        centre=centre, angle=angle, shift=shift, scale=scale, shear=shear
    )
    back = [a * moved[0] + b * moved[1] + c, d * moved[0] + e * moved[1] + f]
    np.testing.assert_allclose(back, point, rtol=1e-12)


def test_draws_depend_on_seed_epoch_and_row_alone():
    jpeg = _jpeg(_image(256, 300))
    transform = ImageTransform()
    base = pixels(jpeg, transform, (1, 2, 3))
    assert np.array_equal(base, pixels(jpeg, transform, (1, 2, 3)))
    for key in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert not np.array_equal(base, pixels(jpeg, transform, key))


def test_without_augmentation_training_sees_the_centre():
    jpeg = _jpeg(_image(256, 300))
    plain = ImageTransform(augment=False)
    assert np.array_equal(pixels(jpeg, plain, (1, 2, 3)), pixels(jpeg, plain, None))
    cropped = ImageTransform(augment=False, crop="random")
    image = np.asarray(decode_grey(jpeg, 256))
    places = set()
    for row in range(8):
        found = pixels(jpeg, cropped, (1, 2, row))
        windows = np.lib.stride_tricks.sliding_window_view(image, (224, 224))
        (place,) = np.argwhere((windows == found).all(axis=(2, 3)))
        places.add(tuple(place.tolist()))
    assert len(places) > 5


def test_a_larger_crop_than_the_image_is_black_outside():
    found = crop(_image(60, 80), (-20, -10), 100)
    assert found.shape == (100, 100)
    assert (found[:, :20] == 0).all()
    assert np.array_equal(found[10:90, 20:80], np.asarray(_image(60, 80)))


@pytest.mark.parametrize("broken", [b"", b"no image", _jpeg(_image(64, 64))[:300]])
def test_unreadable_bytes_are_an_input_error(broken):
    with pytest.raises(InputError, match="image bytes cannot be decoded"):
        decode_grey(broken, 64)
