"""One image file to a tensor."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drive.experiments.runs.inputs import require

BROKEN = "broken or no image"
LARGE = "too many pixels"
RANGE = "values out of range"

# of greys beyond 8 bits: largest value, what it is multiplied with; the first that fits
_SCALES: dict[str, list[tuple[float, float]]] = {
    "I;16": [(65535, 1 / 257)],
    "I": [(255, 1), (65535, 1 / 257)],
    "F": [(1, 255), (255, 1)],
}


def decode(path: Path, side: int) -> Tensor | str:
    """[3, side, side] uint8, or why the file is left out; as `open_image`."""
    image = open_image(path)
    if isinstance(image, str):
        return image
    if image.size != (side, side):
        image = require("PIL.ImageOps").fit(image, (side, side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def open_image(path: Path) -> Any:
    """An RGB image of Pillow, or why there is none (BROKEN, LARGE, RANGE).

    Colours are those of Pillow's `convert("RGB")`, as in torchvision: transparency is dropped, and what is
    transparent keeps the colour it has in the file or its palette; frames after the first are dropped.
    Greys beyond 8 bits, which that would clip at 255, keep their picture: 16 bits are divided by 257 and
    rounded. Integers of 32 bits that go beyond 255 are taken for 16 bits, others for 8; floats within [0, 1]
    are multiplied with 255, others within [0, 255] are taken as they are. Whatever is not finite, negative
    or larger is out of range.

    Raises:
        OSError: the system does not read the file.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        error.filename = error.filename or str(path)  # that of a disk which fails has none
        raise
    pillow = require("PIL.Image")
    try:
        with pillow.open(io.BytesIO(content)) as image:
            return _rgb(image)
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning):
        return LARGE
    except Exception:  # of broken files the decoders make struct.error, IndexError and more
        return BROKEN


@contextmanager
def decoding() -> Iterator[None]:
    """Pillow's warnings while images are decoded, in threads maybe: silent, and an error for too many pixels.

    Filters are the whole process's: to set them anew for each image would leave them with those of another.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        warnings.simplefilter("error", require("PIL.Image").DecompressionBombWarning)
        yield


def _rgb(image: Any) -> Any:
    mode = "I;16" if image.mode == "I" and image.format in ("PNG", "PPM") else image.mode[:4]
    if mode not in _SCALES:
        return image.convert("RGB")
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    factor = next((factor for top, factor in _SCALES[mode] if low >= 0 and high <= top), None)
    if factor is None:
        return RANGE
    return require("PIL.Image").fromarray(np.rint(values * factor).astype(np.uint8)).convert("RGB")
