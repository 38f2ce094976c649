"""Folders of images."""

from __future__ import annotations

from pathlib import Path

import pytest


def image_folder(folder: Path, count: int = 4, size: tuple[int, int] = (40, 36), shade: int = 200) -> Path:
    """Red and blue images, to train and to validate."""
    image = pytest.importorskip("PIL.Image", reason="images are decoded by Pillow")
    for part in ("train", "val"):
        for name, colour in (("blue", (0, 0, shade)), ("red", (shade, 0, 0))):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                image.new("RGB", size, colour).save(folder / part / name / f"{index}.png")
    return folder
