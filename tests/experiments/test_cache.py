"""Decoded images in the cache: the same as decoded anew, and never those of other files."""

import shutil
import tarfile
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from images import image_folder

from drive.experiments.data import cache, imagefolder
from drive.experiments.data import sources as data
from drive.experiments.data.dataset import Dataset
from drive.experiments.runs.inputs import InputError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = image_folder(tmp_path / "photos")
    (folder / "train/red/1.png").write_bytes(b"broken")
    return folder


def same(a: Dataset, b: Dataset) -> bool:
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in fields(a)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def test_cached_is_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = imagefolder.load_folder(folder)
    first = data.load("imagefolder", str(folder))
    larger = data.load("tinyimagenet", str(folder))
    monkeypatch.setattr(data, "load_folder", lambda *_: pytest.fail("decoded again"))
    second = data.load("imagefolder", str(folder))
    assert same(decoded, first) and same(decoded, second)
    assert second.skipped == ("train/red/1.png",)
    assert (second.side, larger.side) == (32, 64)


def test_changed_files_are_decoded_again(folder: Path) -> None:
    before = data.load("imagefolder", str(folder))
    shutil.copy(folder / "train/red/0.png", folder / "train/red/1.png")
    after = data.load("imagefolder", str(folder))
    assert len(after.train_y) == len(before.train_y) + 1 and not after.skipped


@pytest.mark.parametrize("content", [b"", b"broken", None])
def test_a_broken_cache_is_replaced(folder: Path, content: bytes | None) -> None:
    first = data.load("imagefolder", str(folder))
    (path,) = cache.cache_folder().iterdir()
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    assert same(data.load("imagefolder", str(folder)), first)
    assert same(data.load("imagefolder", str(folder)), first)


def test_without_a_place_for_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert len(data.load("imagefolder", str(folder)).train_y) == 7


def test_an_archive_is_its_folder(folder: Path, tmp_path: Path) -> None:
    for name, inside in (("cifar10.tar.gz", "."), ("nested.tar.gz", "photos")):
        with tarfile.open(tmp_path / name, "w:gz") as archive:
            archive.add(folder, inside)
        found = data.load("cifar10", data.locate("cifar10", str(tmp_path / name)))
        assert same(found, imagefolder.load_folder(folder))
    assert data.locate("cifar10", str(tmp_path)) == str(tmp_path / "cifar10.tar.gz")
    assert data.locate("cifar100", str(tmp_path)) == str(tmp_path)
    (tmp_path / "cifar10").mkdir()
    assert data.locate("cifar10", str(tmp_path)) == str(tmp_path / "cifar10")


def test_no_archive(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no archive")
    with pytest.raises(InputError, match="--data-dir must be a folder or a tar archive of one, got "):
        data.load("cifar10", str(tmp_path / "notes.txt"))


def test_tiny_imagenet_as_it_is_published(folder: Path, tmp_path: Path) -> None:
    plain = imagefolder.load_folder(folder, 64)
    for name in ("blue", "red"):
        inside = folder / "train" / name / "images"
        inside.mkdir()
        for path in (folder / "train" / name).glob("*.png"):
            path.rename(inside / path.name)
    lines = []
    (folder / "val/images").mkdir()
    for name in ("blue", "red"):
        for path in sorted((folder / "val" / name).iterdir()):
            path.rename(folder / "val/images" / f"{name}{path.name}")
            lines.append(f"{name}{path.name}\t{name}\t0\t0\t62\t62")
        (folder / "val" / name).rmdir()
    (folder / "test/images").mkdir(parents=True)  # without labels
    annotations = folder / "val/val_annotations.txt"
    annotations.write_text("\n".join(lines) + "\n")
    found = data.load("tinyimagenet", str(folder))
    assert torch.equal(found.train_x, plain.train_x) and torch.equal(found.test_x, plain.test_x)
    assert torch.equal(found.train_y, plain.train_y) and torch.equal(found.test_y, plain.test_y)
    annotations.write_text("0.png\tgreen\n")
    with pytest.raises(
        InputError, match="--data-dir must have the same classes to train and test, got green"
    ):
        imagefolder.load_folder(folder)
