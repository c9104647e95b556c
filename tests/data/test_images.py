from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.errors import InputError
from data.images import ImageCache, UnreadableImageError, prepare_images, shrink_image

XRAYS = sorted((Path(__file__).parents[1] / "fixtures" / "cxr").glob("*.jpg"))


def encode(pixels: np.ndarray, mode: str | None = None, fmt: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, format=fmt, **options)
    return buffer.getvalue()


def pixels_of(encoded: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(encoded))
    assert (image.format, image.mode) == ("JPEG", "L")
    return np.asarray(image, dtype=np.float64)


def gradient(height: int = 90, width: int = 120) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    return (rows / height * 120 + columns / width * 120).astype(np.uint8)


@pytest.mark.parametrize("path", XRAYS, ids=lambda path: path.stem)
@pytest.mark.parametrize("short_side", [64, 128, 256])
def test_scaled_decoding_is_close_to_full_decoding(path, short_side):
    full = Image.open(path).convert("L")
    scale = short_side / min(full.size)
    size = tuple(round(side * scale) for side in full.size)
    reference = np.asarray(full.resize(size, Image.Resampling.BILINEAR), dtype=np.float64)
    shrunk = pixels_of(shrink_image(path.read_bytes(), short_side)[0])
    assert shrunk.shape == reference.shape
    assert min(shrunk.shape) == short_side
    assert np.abs(shrunk - reference).mean() < 2.5
    assert np.corrcoef(shrunk.ravel(), reference.ravel())[0, 1] > 0.995


def test_there_are_real_xrays():
    assert len(XRAYS) == 4


def test_the_decoder_itself_scales(monkeypatch):
    """A 16 x larger JPEG is never decoded at its full size."""
    seen = []
    load = Image.Image.convert

    def note(self, mode=None, **options):
        seen.append(self.size)
        return load(self, mode, **options)

    raw = encode(np.kron(gradient(), np.ones((16, 16), np.uint8)), fmt="JPEG")
    monkeypatch.setattr(Image.Image, "convert", note)
    shrink_image(raw, 90)
    assert seen == [(1920 // 8, 1440 // 8)]


@pytest.mark.parametrize(("height", "width"), [(300, 200), (200, 300), (40, 40), (1000, 401)])
def test_aspect_is_kept_and_the_short_side_exact(height, width):
    shrunk = pixels_of(shrink_image(encode(gradient(height, width)), 64)[0])
    assert min(shrunk.shape) == 64
    assert max(shrunk.shape) == pytest.approx(64 * max(height, width) / min(height, width), abs=1)
    assert (shrunk.shape[0] >= shrunk.shape[1]) == (height >= width)


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1", "CMYK"])
def test_modes_become_grey(mode):
    fmt = "JPEG" if mode == "CMYK" else "PNG"
    expected = np.asarray(Image.fromarray(gradient()).convert(mode).convert("L"), dtype=np.float64)
    encoded, repair = shrink_image(encode(gradient(), mode, fmt), 90)
    assert repair == ""
    assert np.abs(pixels_of(encoded) - expected).mean() < 6


def test_sixteen_bits_are_stretched():
    wide = gradient().astype(np.uint16) * 12 + 700  # a 12-bit image in 16 bits
    encoded, repair = shrink_image(encode(wide), 90)
    shown = pixels_of(encoded)
    assert repair == "images scaled from 16 bits"
    expected = gradient() / gradient().max() * 255
    assert np.abs(shown - expected).mean() < 2
    flat, _ = shrink_image(encode(np.full((40, 40), 9_000, np.uint16)), 40)
    assert pixels_of(flat).max() < 3


def test_transparency_is_laid_over_black():
    rgba = np.dstack([gradient()] * 3 + [np.full_like(gradient(), 255)])
    rgba[:, 60:, 3] = 0
    encoded, repair = shrink_image(encode(rgba), 90)
    shown = pixels_of(encoded)
    assert repair == "images without transparency"
    assert shown[:, 80:].max() < 6
    assert np.abs(shown[:, :50] - gradient()[:, :50]).mean() < 3


def test_bytes_are_deterministic_and_carry_no_metadata():
    torn = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x00"
    raw = encode(gradient(), fmt="JPEG", exif=torn, comment="Jane Roe")
    assert b"Exif" in raw
    first, again = shrink_image(raw, 64)[0], shrink_image(raw, 64)[0]
    assert first == again
    assert b"Exif" not in first
    assert b"Jane" not in first


def bad_images() -> dict[str, tuple[bytes, str]]:
    jpeg, png = XRAYS[0].read_bytes(), encode(gradient())
    return {
        "empty": (b"", "the file is empty"),
        "text": (b"<html>not found</html>", "neither JPEG nor PNG"),
        "zeros": (bytes(4096), "neither JPEG nor PNG"),
        "truncated": (jpeg[: len(jpeg) // 2], "truncated or corrupt"),
        "header_only": (jpeg[:200], "truncated or corrupt"),
        "truncated_png": (png[: len(png) // 2], "truncated or corrupt"),
        "corrupt_png": (png[:60] + bytes(40) + png[100:], "truncated or corrupt"),
        "gif": (encode(gradient(), fmt="GIF"), "neither JPEG nor PNG"),
        "tiny": (encode(gradient(5, 200)), "fewer than 16 pixels on a side"),
    }


@pytest.mark.parametrize("kind", bad_images())
def test_bad_bytes_are_refused(kind):
    raw, reason = bad_images()[kind]
    with pytest.raises(UnreadableImageError, match=reason):
        shrink_image(raw, 64)


def test_implausibly_many_pixels(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    with pytest.raises(UnreadableImageError, match="implausibly many pixels"):
        shrink_image(encode(gradient(90, 80)), 64)  # a warning of Pillow
    with pytest.raises(UnreadableImageError, match="implausibly many pixels"):
        shrink_image(encode(gradient(200, 200)), 64)  # an error of Pillow


def test_the_run_goes_on_past_bad_images(tmp_path):
    bad = bad_images()
    for name, (raw, _) in bad.items():
        (tmp_path / f"{name}.jpg").write_bytes(raw)
    (tmp_path / "good.jpg").write_bytes(XRAYS[0].read_bytes())
    (tmp_path / "wide.png").write_bytes(encode(gradient().astype(np.uint16)))
    requests = [(name, f"{name}.jpg") for name in (*bad, "good", "gone")]
    result = prepare_images([*requests, ("wide", "wide.png")], tmp_path, 64, None)
    assert set(result.images) == {"good", "wide"}
    assert result.images["good"] == shrink_image(XRAYS[0].read_bytes(), 64)[0]
    assert sum(item.count for item in result.quarantine) == len(bad) + 1
    by_reason = {item.reason: item for item in result.quarantine}
    assert by_reason["the file is missing"].examples == ("gone",)
    assert by_reason["truncated or corrupt"].count == 4
    assert result.counters == {"images scaled from 16 bits": 1}


def test_examples_are_at_most_five(tmp_path):
    result = prepare_images([(f"d{n}", "no.jpg") for n in range(9)], tmp_path, 64, None)
    assert result.quarantine[0].count == 9
    assert len(result.quarantine[0].examples) == 5


def test_the_cache_answers_and_gives_the_same(tmp_path, monkeypatch):
    source = tmp_path / "cxr"
    source.mkdir()
    (source / "a.jpg").write_bytes(XRAYS[0].read_bytes())
    (source / "w.jpg").write_bytes(encode(gradient().astype(np.uint16)))
    requests = [("a", "a.jpg"), ("w", "w.jpg")]
    cache = ImageCache(tmp_path / "cache")
    first = prepare_images(requests, source, 64, cache)

    def refuse(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr("data.images.shrink_image", refuse)
    assert prepare_images(requests, source, 64, ImageCache(tmp_path / "cache")) == first
    assert first.counters == {"images scaled from 16 bits": 1}
    with pytest.raises(AssertionError, match="decoded again"):
        prepare_images(requests, source, 32, cache)


def test_a_replaced_source_is_decoded_again(tmp_path):
    cache = ImageCache(tmp_path / "cache")
    path = tmp_path / "a.jpg"
    path.write_bytes(XRAYS[0].read_bytes())
    first = prepare_images([("a", "a.jpg")], tmp_path, 64, cache).images["a"]
    stamp = path.stat().st_mtime_ns
    path.write_bytes(XRAYS[1].read_bytes())
    os.utime(path, ns=(stamp, stamp + 1))
    second = prepare_images([("a", "a.jpg")], tmp_path, 64, cache).images["a"]
    assert second == shrink_image(XRAYS[1].read_bytes(), 64)[0] != first


def test_a_torn_entry_is_made_again(tmp_path):
    cache = ImageCache(tmp_path / "cache")
    (tmp_path / "a.jpg").write_bytes(XRAYS[0].read_bytes())
    first = prepare_images([("a", "a.jpg")], tmp_path, 64, cache).images["a"]
    (entry,) = (tmp_path / "cache").rglob("*.jpg")
    assert entry.stat().st_mode & 0o777 == 0o600
    entry.write_bytes(first[:100])
    assert prepare_images([("a", "a.jpg")], tmp_path, 64, cache).images["a"] == first
    assert entry.read_bytes() == first


def test_a_full_disk_leaves_no_entry(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    (tmp_path / "a.jpg").write_bytes(XRAYS[0].read_bytes())
    monkeypatch.setattr("data.files.os.replace", full)
    with pytest.raises(InputError, match="cache: the disk is full; free some space"):
        prepare_images([("a", "a.jpg")], tmp_path, 64, ImageCache(tmp_path / "cache"))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_killed_run_continues_where_it_was(tmp_path, monkeypatch):
    for name in "abcd":
        (tmp_path / f"{name}.jpg").write_bytes(XRAYS[0].read_bytes())
    requests = [(name, f"{name}.jpg") for name in "abcd"]
    cache = ImageCache(tmp_path / "cache")
    decoded = []

    def dies_at_third(raw: bytes, short_side: int) -> tuple[bytes, str]:
        if len(decoded) == 2:
            raise KeyboardInterrupt
        decoded.append(raw)
        return shrink_image(raw, short_side)

    monkeypatch.setattr("data.images.shrink_image", dies_at_third)
    with pytest.raises(KeyboardInterrupt):
        prepare_images(requests, tmp_path, 64, cache)
    decoded.clear()
    assert len(prepare_images(requests, tmp_path, 64, cache).images) == 4
    assert len(decoded) == 2
