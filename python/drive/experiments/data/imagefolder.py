"""A folder of images, one sub-folder per class, or a tar archive of it, decoded once into uint8 tensors."""

from __future__ import annotations

import os
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from drive.experiments.runs.inputs import InputError

from .cache import cached
from .dataset import Dataset
from .decode import decode, decoding, open_image
from .layout import Layout, layout_of
from .names import left_out, shown


def load_folder(place: Path, side: int | None = None) -> Dataset:
    """Images of a folder or tar archive as square RGB, from the cache if they are there; see `layout_of` for
    where they lie, and `open_image` for their values.

    Images of another size are scaled so that the shorter side fits, then cropped at the centre. Files that
    are none are left out and named; so are classes without a test image.

    Args:
        side: of the images, in pixels. None: 32 if the first readable training image's shorter side is at
            most 48, else 64, the sizes that the models are made for.

    Raises:
        InputError: as `layout_of`; a class without a readable training image, no readable test image, a file
            that is no archive, or a damaged one.
        OSError: a folder or file that the system does not read.
    """
    real = Path(os.path.realpath(place))
    if real.is_file():
        return cached(real, side, [real], lambda: _decode_archive(place, side))
    found = layout_of(real, place)
    return cached(real, (side, found), found.files, lambda: _decode(found, side))


def _decode_archive(place: Path, side: int | None) -> Dataset:
    with _unpacked(place) as folder:
        return _decode(layout_of(folder, place), side)


@contextmanager
def _unpacked(place: Path) -> Iterator[Path]:
    """What a tar archive holds, as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="drive-") as folder:
        try:
            with tarfile.open(place) as archive:
                archive.extractall(folder, filter="data")
                _check_end(archive)
        # damaged ones raise what their decompressor does, or what the numbers in their headers lead to
        except Exception as error:
            raise InputError(
                f"--data-dir must be a folder or a tar archive of one, got {shown(place)} ({error})"
            ) from error
        inside = [path for path in Path(folder).iterdir() if not path.name.startswith(".")]
        yield inside[0] if len(inside) == 1 and inside[0].is_dir() else Path(folder)


def _check_end(archive: tarfile.TarFile) -> None:
    """tarfile takes a damaged header, or the end of a file that was cut off, for the end of the archive: that
    is zeros. To read them all has the checksum of a compressed file compared."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    rest = archive.fileobj.read(tarfile.BLOCKSIZE)
    whole = len(rest) == tarfile.BLOCKSIZE
    while rest:
        whole &= not rest.strip(b"\0")
        rest = archive.fileobj.read(1 << 20)
    if not whole:
        raise tarfile.ReadError("cut off, or damaged within")


def _decode(found: Layout, side: int | None) -> Dataset:
    _check_classes(found, {label for _, label in found.train}, found.skipped)  # before work is put into it
    skipped = list(found.skipped)
    with decoding(), ThreadPoolExecutor() as pool:  # the decoders release the interpreter's lock
        side = side or _common_side(found)
        train_x, train_y = _decode_all(pool, found, found.train, side, skipped)
        _check_classes(found, set(train_y.tolist()), skipped)
        test_x, test_y = _decode_all(pool, found, found.test, side, skipped)
    if not len(test_y):
        raise InputError(_needed("a readable image to test", "none", skipped))
    untested = sorted(set(range(len(found.classes))).difference(test_y.tolist()))
    skipped += [(f"{shown(found.classes[label])}/", "a class without a test image") for label in untested]
    return Dataset(
        torch.stack(train_x), train_y, torch.stack(test_x), test_y,
        classes=len(found.classes), augment=True, skipped=tuple(skipped),
    )  # fmt: skip


def _check_classes(found: Layout, labels: set[int], skipped: Iterable[tuple[str, str]]) -> None:
    """InputError if a class is not among the labels."""
    for label, name in enumerate(found.classes):
        if label not in labels:
            of_class = [(file, why) for file, why in skipped if file.startswith(f"train/{shown(name)}/")]
            raise InputError(
                _needed("readable images of every class to train", f"none of class {shown(name)}", of_class)
            )


def _needed(what: str, got: str, skipped: Iterable[tuple[str, str]]) -> str:
    return "; ".join([f"--data-dir must have {what}, got {got}", *left_out(skipped)])


def _decode_all(
    pool: Executor, found: Layout, files: list[tuple[Path, int]], side: int, skipped: list[tuple[str, str]]
) -> tuple[list[Tensor], Tensor]:
    """Images [3, side, side] uint8 and labels [N] int64; adds the files that are none to `skipped`."""
    images, labels = [], []
    decoded = pool.map(lambda file: decode(file[0], side), files)
    for (path, label), image in zip(files, decoded, strict=True):
        if isinstance(image, str):
            skipped.append((shown(path, found.folder), image))
        else:
            images.append(image)
            labels.append(label)
    return images, torch.tensor(labels, dtype=torch.int64)


def _common_side(found: Layout) -> int:
    for path, _ in found.train:
        image = open_image(path)
        if not isinstance(image, str):
            return 32 if min(image.size) <= 48 else 64
    return 32
