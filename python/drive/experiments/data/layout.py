"""Which files of a folder are the images of which class, and which are left out."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from drive.experiments.runs.inputs import InputError, require

from .names import shown

_IMAGES, _ANNOTATIONS = "images", "val_annotations.txt"  # of Tiny ImageNet
_HIDDEN = {"thumbs.db", "desktop.ini"}  # by an attribute, where they come from

SUBFOLDER = "in a sub-folder of a class"
OUTSIDE = "in the folder of no class"
SUFFIX = "without the suffix of an image"
NOWHERE = "gone, or a link that leads nowhere"
SPECIAL = "a pipe, socket or device"
UNLABELLED = f"without a line in {_ANNOTATIONS}"
MISSING = f"missing, but with a line in {_ANNOTATIONS}"


@dataclass(frozen=True)
class Layout:
    """What a folder of images holds."""

    folder: Path
    classes: list[str]  # by name; labels count them
    train: list[tuple[Path, int]]  # path, label
    test: list[tuple[Path, int]]
    skipped: list[tuple[str, str]]  # as in a Dataset

    @property
    def files(self) -> list[Path]:
        """All images, and the folders that they lie in: names may be exchanged, and links lead elsewhere."""
        images = [path for path, _ in self.train + self.test]
        folders = {path.parent for path in images}
        folders |= {above for path in folders for above in path.parents if self.folder in above.parents}
        return sorted(folders) + images


def layout_of(folder: Path, source: Path) -> Layout:
    """The images of `train/<class>/*` and `test/<class>/*` (or `val`), links followed, by name.

    Of test and val that is taken, in this order, which has labels. As in Tiny ImageNet, images may lie in a
    folder `images` of their class, and those of test all in `images`, their classes in
    `val_annotations.txt`. What is hidden (`.name`, Thumbs.db) is none of the data; every other file under
    the two folders is an image of a class, or left out and named.

    Args:
        source: the folder, or the archive that it comes from, for messages.

    Raises:
        InputError: a missing folder, less than two classes, test classes that training lacks, annotations
            that are none.
        OSError: a folder that cannot be read.
    """
    train = folder / "train"
    classes = _folders(train)
    test = _test_part(folder, classes)
    for needed in (folder, train, test):
        if not os.path.isdir(needed):
            raise InputError(
                f"--data-dir must be a folder with train/<class>/* and test/ or val/<class>/* images, "
                f"got {shown(source)} (no folder {shown(needed, folder)})"
            )
    if len(classes) < 2:
        raise _other_classes(f"{len(classes)} in train")
    walk = _Walk(folder, classes)
    train_images, test_images = walk.part(train), walk.part(test)
    for other in _folders(folder):
        if other not in (train.name, test.name) and _is_part(folder / other, classes):
            walk.skip(f"{folder / other}/", f"beside train/ and {test.name}/, which are read")
    return Layout(folder, classes, train_images, test_images, walk.skipped)


def _other_classes(got: str) -> InputError:
    return InputError(f"--data-dir must have the same two or more classes to train and test, got {got}")


def _test_part(folder: Path, classes: list[str]) -> Path:
    """The first of test and val that has labels, or else that is there."""
    parts = [folder / name for name in ("test", "val") if os.path.isdir(folder / name)]
    labelled = [p for p in parts if os.path.isfile(p / _ANNOTATIONS) or _has_any(p, classes)]
    return next(iter(labelled + parts), folder / "val")


def _is_part(folder: Path, classes: list[str]) -> bool:
    return folder.name in ("test", "val") or _has_any(folder, classes)


def _has_any(folder: Path, classes: Iterable[str]) -> bool:
    return any(os.path.isdir(folder / name) for name in classes)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _HIDDEN


def _folders(folder: Path) -> list[str]:
    """Names of the folders in a folder; none if there is no such folder."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(name for name in names if not _is_hidden(name) and os.path.isdir(folder / name))


class _Walk:
    """Finds the images of train and test; whatever else it meets goes to `skipped`."""

    def __init__(self, folder: Path, classes: list[str]):
        self.skipped: list[tuple[str, str]] = []
        self._folder = folder
        self._labels = {name: label for label, name in enumerate(classes)}

    def skip(self, path: Path | str, why: str) -> None:
        self.skipped.append((shown(path, self._folder), why))

    def part(self, part: Path) -> list[tuple[Path, int]]:
        """Images with labels of train or test."""
        folders, files = self._entries(part)
        annotated = part / _ANNOTATIONS in files
        if annotated and not any(folder.name in self._labels for folder in folders):
            files.remove(part / _ANNOTATIONS)
            found = self._annotated(part)
            folders = [folder for folder in folders if folder.name != _IMAGES]
        else:
            found = []
            for folder in folders:
                if folder.name in self._labels:
                    found += [(path, self._labels[folder.name]) for path in self._of_class(folder)]
                elif not (annotated and folder.name == _IMAGES):
                    raise _other_classes(f"class {shown(folder.name)} is in {part.name} only")
            folders = [folder for folder in folders if folder.name not in self._labels]
        for path in files:
            self.skip(path, OUTSIDE)
        for folder in folders:
            self._skip_below(folder, OUTSIDE)
        return found

    def _of_class(self, folder: Path) -> list[Path]:
        folders, files = self._entries(folder)
        for below in folders:
            if below.name == _IMAGES and not os.path.samefile(below, folder):
                deeper, more = self._entries(below)
                files += more
            else:
                deeper = [below]
            for path in deeper:
                self._skip_below(path, SUBFOLDER)
        return self._images(files)

    def _annotated(self, part: Path) -> list[tuple[Path, int]]:
        """The images in `images`, their classes in `val_annotations.txt`."""
        classes = _annotations(part / _ANNOTATIONS)
        for name in sorted(set(classes.values())):
            if name not in self._labels:
                raise InputError(
                    f"--data-dir must have the same classes to train and test, got {shown(name)} in test only"
                )
        folder = part / _IMAGES
        folders, files = self._entries(folder)
        for below in folders:
            self._skip_below(below, OUTSIDE)
        found = []
        for path in self._images(files):
            if path.name in classes:
                found.append((path, self._labels[classes[path.name]]))
            else:
                self.skip(path, UNLABELLED)
        for name in sorted(set(classes).difference(os.listdir(folder))):
            self.skip(f"{folder}/{name}", MISSING)
        return found

    def _entries(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """The folders and files in a folder, or behind links in there."""
        folders: list[Path] = []
        files: list[Path] = []
        for name in sorted(os.listdir(folder)):
            path = folder / name
            if _is_hidden(name):
                continue
            try:
                mode = path.stat().st_mode
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    raise
                self.skip(path, NOWHERE)
                continue
            if stat.S_ISDIR(mode):
                folders.append(path)
            elif stat.S_ISREG(mode):
                files.append(path)
            else:
                self.skip(path, SPECIAL)
        return folders, files

    def _images(self, files: list[Path]) -> list[Path]:
        found = []
        for path in files:
            if path.suffix.lower() in _suffixes():
                found.append(path)
            else:
                self.skip(path, SUFFIX)
        return found

    def _skip_below(self, folder: Path, why: str) -> None:
        """All files of a folder; links to folders, which may lead in a circle, themselves."""
        if folder.is_symlink():
            self.skip(f"{folder}/", why)
            return
        # what cannot be read is left out like the rest
        for below, folders, files in os.walk(folder, onerror=lambda e: self.skip(f"{e.filename}/", why)):
            folders[:] = sorted(name for name in folders if not _is_hidden(name))
            links = [f"{name}/" for name in folders if os.path.islink(os.path.join(below, name))]
            for name in sorted(links + [name for name in files if not _is_hidden(name)]):
                self.skip(f"{below}/{name}", why)


@cache
def _suffixes() -> frozenset[str]:
    """Of the formats that Pillow reads."""
    pillow = require("PIL.Image")
    pillow.init()
    return frozenset(s for s, name in pillow.registered_extensions().items() if name in pillow.OPEN)


def _annotations(path: Path) -> dict[str, str]:
    """Class of each image, from lines of name, class and more, between tabs."""
    found: dict[str, str] = {}
    for number, line in enumerate(os.fsdecode(path.read_bytes()).split("\n"), start=1):
        name, *rest = line.rstrip("\r").split("\t")
        if not name and not rest:
            continue
        if not rest or found.setdefault(name, rest[0]) != rest[0]:
            raise InputError(
                f"--data-dir must have an image and its one class, with a tab between, in each line of "
                f"{_ANNOTATIONS}, got {shown(line[:80])!r} in line {number}"
            )
    return found
