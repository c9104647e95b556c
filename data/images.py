"""Chest X-rays as they lie on disk into grey JPEG bytes of one short side, with a cache.

A released radiograph has some 2,500 x 3,000 pixels. A JPEG decoder can leave out the high
frequencies of each 8 x 8 block and give an image of 1/2, 1/4 or 1/8 of the size for a fraction of
the time; the last step down to the short side is an ordinary antialiased resize.
"""

from __future__ import annotations

import errno
import hashlib
import io
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

from data.errors import InputError
from data.files import PRIVATE, atomic_path
from data.flow import Quarantined

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

JPEG_QUALITY = 92
_ENCODING = "grey-jpeg-1"
"""Part of every cache key: raise the number when the bytes for the same source change."""
_SMALLEST_SIDE = 16
_WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "F")
_EXAMPLES = 5


class UnreadableImageError(Exception):
    """An image that cannot be used; the message is the reason, the same for every such image."""


@dataclass(frozen=True)
class PreparedImages:
    """What became of the requested images.

    Attributes:
        images: dicom_id -> grey JPEG bytes.
        quarantine: The images that could not be read, one entry for each reason.
        counters: Counted repairs: images scaled from 16 bits, images whose transparency was
            removed. They do not depend on what the cache held.
    """

    images: dict[str, bytes]
    quarantine: list[Quarantined] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)


class ImageCache:
    """Encoded images on a local disk, one file each, found by what they were made from.

    The key is the image's id, the size and modification time of its source, the short side and the
    encoding, so that a replaced source or another side never meets an old entry. Entries appear
    whole; a killed run continues with what is there, and several processes may share a folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> bytes | None:
        """The entry, or None if there is none or it is torn."""
        try:
            encoded = self._path(key).read_bytes()
        except FileNotFoundError:
            return None
        whole = encoded.startswith(b"\xff\xd8") and encoded.endswith(b"\xff\xd9")
        return encoded if whole else None

    def put(self, key: str, encoded: bytes) -> None:
        """Store an entry, whole or not at all.

        Raises:
            InputError: The disk is full.
        """
        try:
            with atomic_path(self._path(key)) as temporary:
                temporary.write_bytes(encoded)
                temporary.chmod(PRIVATE)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InputError(
                f"{self.folder}: the disk is full; free some space and run the same command again: "
                "it goes on from the images that are there"
            ) from None

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.jpg"


def cache_key(dicom_id: str, size: int, mtime_ns: int, short_side: int) -> str:
    """The name of an image in the cache."""
    made_from = f"{_ENCODING}|{dicom_id}|{size}|{mtime_ns}|{short_side}"
    return hashlib.blake2b(made_from.encode(), digest_size=20).hexdigest()


def prepare_images(
    requests: Iterable[tuple[str, str]], root: Path, short_side: int, cache: ImageCache | None
) -> PreparedImages:
    """Read, shrink and encode the requested images, those in the cache excepted.

    An image that is missing, empty, truncated, corrupt or of another format is set aside and
    counted; the others go on.

    Args:
        requests: dicom_id and path below `root`; a repeated dicom_id is prepared once.
        root: The folder of MIMIC-CXR-JPG.
        short_side: Pixels of the shorter side of the result.
        cache: Where encoded images are kept, or None for no cache.
    """
    images: dict[str, bytes] = {}
    failures: dict[str, list[str]] = {}
    counters: dict[str, int] = {}
    for dicom_id, path in dict(requests).items():
        try:
            encoded, repair = _prepare(dicom_id, root / path, short_side, cache)
        except UnreadableImageError as error:
            failures.setdefault(str(error), []).append(dicom_id)
            continue
        images[dicom_id] = encoded
        if repair:
            counters[repair] = counters.get(repair, 0) + 1
    quarantine = [
        Quarantined(
            place="images",
            reason=reason,
            count=len(ids),
            examples=tuple(ids[:_EXAMPLES]),
        )
        for reason, ids in sorted(failures.items())
    ]
    return PreparedImages(images, quarantine, counters)


def _prepare(
    dicom_id: str, path: Path, short_side: int, cache: ImageCache | None
) -> tuple[bytes, str]:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UnreadableImageError("the file is missing") from None
    key = cache_key(dicom_id, status.st_size, status.st_mtime_ns, short_side)
    if cache is not None and (encoded := cache.get(key)) is not None:
        return encoded, _repair_of(encoded)
    try:
        raw = path.read_bytes()
    except (PermissionError, IsADirectoryError):
        raise UnreadableImageError("the file may not be read") from None
    encoded, repair = shrink_image(raw, short_side)
    if cache is not None:
        cache.put(key, encoded)
    return encoded, repair


def shrink_image(raw: bytes, short_side: int) -> tuple[bytes, str]:
    """Encode an image as grey JPEG whose shorter side has `short_side` pixels.

    Images of 16 or more bits are stretched from their darkest to their brightest value to 8 bits,
    as MIMIC-CXR-JPG itself was made from DICOM; transparency is laid over black.

    Args:
        raw: A JPEG or PNG file: grey, colour, palette, with transparency, 8 or 16 bits.
        short_side: Pixels; smaller images are enlarged.

    Returns:
        The JPEG bytes (one channel, quality 92, no metadata of the source), and the name of the
        repair that was needed, or an empty string. A repair is also the JPEG's comment, so that a
        cached image still tells of it.

    Raises:
        UnreadableImageError: Empty, truncated, corrupt, of another format, or of an absurd size.
    """
    if not raw:
        raise UnreadableImageError("the file is empty")
    try:
        grey, repair = _decode(raw, short_side)
    except UnidentifiedImageError:
        raise UnreadableImageError("neither JPEG nor PNG") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UnreadableImageError("implausibly many pixels") from None
    except (OSError, SyntaxError, ValueError, EOFError):
        raise UnreadableImageError("truncated or corrupt") from None
    scale = short_side / min(grey.size)
    width, height = (max(short_side, round(side * scale)) for side in grey.size)
    if (width, height) != grey.size:
        grey = grey.resize((width, height), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    grey.save(buffer, format="JPEG", quality=JPEG_QUALITY, comment=repair)
    return buffer.getvalue(), repair


def is_prepared(raw: bytes, short_side: int) -> bool:
    """Whether an image is a grey JPEG of that short side already, so that nothing is to be done."""
    try:
        image: Image.Image = Image.open(io.BytesIO(raw), formats=("JPEG",))
    except (OSError, SyntaxError, ValueError, EOFError):
        return False
    return image.mode == "L" and min(image.size) == short_side


def _repair_of(encoded: bytes) -> str:
    comment: bytes = Image.open(io.BytesIO(encoded)).info.get("comment", b"")
    return comment.decode("ascii", "replace")


def _decode(raw: bytes, short_side: int) -> tuple[Image.Image, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torn metadata, which is not kept
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image: Image.Image = Image.open(io.BytesIO(raw), formats=("JPEG", "PNG"))
        if min(image.size) < _SMALLEST_SIDE:
            raise UnreadableImageError(f"fewer than {_SMALLEST_SIDE} pixels on a side")
        image.draft("L", (short_side, short_side))
        image.load()
    if image.mode in _WIDE_MODES:
        return _stretch(image), "images scaled from 16 bits"
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        opaque = image.convert("RGBA")
        black = Image.new("RGBA", opaque.size, "black")
        return Image.alpha_composite(black, opaque).convert("L"), "images without transparency"
    return image.convert("L"), ""


def _stretch(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    low, high = values.min(), values.max()
    share = (values - low) / max(high - low, 1.0)
    return Image.fromarray(np.round(share * 255).astype(np.uint8))
