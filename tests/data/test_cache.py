"""Decoded images in the cache: the same as decoded anew, and never those of other files."""

import os
import shutil
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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


def anew(folder: Path) -> Dataset:
    """The images of a folder, past the cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", "/dev/null")
        return imagefolder.load_folder(folder)


def same(a: Dataset, b: Dataset) -> bool:
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in fields(a)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def test_cached_is_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = anew(folder)
    first = data.load("imagefolder", str(folder))
    larger = data.load("tinyimagenet", str(folder))
    monkeypatch.setattr(imagefolder, "decode", lambda *_: pytest.fail("decoded again"))
    second = data.load("imagefolder", str(folder))
    assert same(decoded, first) and same(decoded, second)
    assert second.skipped == (("train/red/1.png", "broken or no image"),)
    assert (second.side, larger.side) == (32, 64)


def test_changed_files_are_decoded_again(folder: Path) -> None:
    before = data.load("imagefolder", str(folder))
    shutil.copy(folder / "train/red/0.png", folder / "train/red/1.png")
    after = data.load("imagefolder", str(folder))
    assert len(after.train_y) == len(before.train_y) + 1 and not after.skipped


@pytest.mark.parametrize(
    "damage",
    [lambda b: b"", lambda b: b"broken", lambda b: b[:-100], lambda b: b[:-1] + b"\1",
     lambda b: b.replace(b'classes\\": 2', b'classes\\": 3')],
    ids=["empty", "none", "cut off", "another pixel", "another class"],
)  # fmt: skip
def test_a_broken_cache_is_replaced(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    first = data.load("imagefolder", str(folder))
    (path,) = (folder.parent / "cache/drive-prune").iterdir()
    whole = path.read_bytes()
    damaged = damage(whole)
    assert damaged != whole
    path.write_bytes(damaged)
    assert same(data.load("imagefolder", str(folder)), first) and path.read_bytes() != damaged


def test_without_a_place_for_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert len(data.load("imagefolder", str(folder)).train_y) == 7


def exchange(a: Path, b: Path) -> None:
    aside = a.with_name("aside")
    a.rename(aside)
    b.rename(a)
    aside.rename(b)


LINKED = {  # what is a link, in a folder of two parts with two classes
    "folder": [""],
    "parts": ["train", "val"],
    "classes": ["train/blue", "train/red", "val/blue", "val/red"],
    "files": [
        f"{part}/{name}/{i}.png" for part in ("train", "val") for name in ("blue", "red") for i in range(2)
    ],
}


def make_alike(folder: Path) -> None:
    """Files of one size, and all of one time, as out of an archive."""
    for path in folder.glob("*/*/*"):
        path.write_bytes(path.read_bytes().ljust(1000, b"\0"))
    for path in [*folder.glob("*/*/*"), *folder.glob("*/*"), *folder.glob("*")]:
        os.utime(path, ns=(0, 0))


@pytest.fixture(params=[True, False], ids=["changes are timed", "changes are not timed"])
def timed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk as all are, and as FAT is: that keeps no time that cannot be set."""

    class Untimed:
        st_ctime_ns = 0

        def __init__(self, *path: object, **options: object):
            self.found = stat(*path, **options)  # type: ignore[arg-type]

        def __getattr__(self, name: str) -> object:
            return getattr(self.found, name)

    if not request.param:
        stat = os.stat
        monkeypatch.setattr(os, "stat", Untimed)


@pytest.mark.parametrize("linked", LINKED.values(), ids=LINKED)
def test_what_lies_behind_links_is_known(tmp_path: Path, linked: list[str], timed: None) -> None:
    """Two sets that differ behind the links only; then one link of the first leads to the second."""
    found = []
    for name in ("first", "second"):
        disk, place = image_folder(tmp_path / "disk" / name, count=2), tmp_path / name / "data"
        if name == "second":
            for part in ("train", "val"):
                exchange(disk / part / "blue", disk / part / "red")
        make_alike(disk)
        for link in linked:
            (place / link).parent.mkdir(parents=True, exist_ok=True)
            (place / link).symlink_to(disk / link)
        found.append(data.load("imagefolder", str(place)))
    first, second = found
    assert torch.equal(first.train_x, second.train_x.flip(0))
    assert not torch.equal(first.train_x, second.train_x)
    link = tmp_path / "first/data" / linked[0]
    link.unlink()
    link.symlink_to(tmp_path / "disk/second" / linked[0])
    if link.parent.name in ("blue", "train"):
        os.utime(link.parent, ns=(0, 0))
    after = data.load("imagefolder", str(tmp_path / "first/data"))
    assert torch.equal(after.train_x[0], second.train_x[0])
    assert not torch.equal(after.train_x, first.train_x)


@pytest.mark.parametrize("what", ["0.png", ""], ids=["files", "folders"])
def test_exchanged_names_are_decoded_again(folder: Path, what: str, timed: None) -> None:
    make_alike(folder)
    before = data.load("imagefolder", str(folder))
    exchange(folder / "train/blue" / what, folder / "train/red" / what)
    after = data.load("imagefolder", str(folder))
    assert torch.equal(after.train_x[0], before.train_x[-1])
    assert not torch.equal(before.train_x, after.train_x)


def test_images_written_anew_are_decoded_again(folder: Path) -> None:
    make_alike(folder)
    before = data.load("imagefolder", str(folder))
    shutil.copyfile(folder / "train/red/0.png", folder / "train/blue/0.png")
    make_alike(folder)
    after = data.load("imagefolder", str(folder))
    assert torch.equal(after.train_x[0], before.train_x[-1])


def test_the_same_images_by_another_path_or_beside_other_things(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = data.load("imagefolder", str(folder))
    (folder / "runs").mkdir()
    (folder / "readme").write_text("")
    (folder.parent / "link").symlink_to(folder)
    monkeypatch.setattr(imagefolder, "decode", lambda *_: pytest.fail("decoded again"))
    monkeypatch.chdir(folder)
    for place in (".", "../photos", "../link", str(folder)):
        assert same(data.load("imagefolder", place), first)


def test_another_pillow_may_read_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data.load("imagefolder", str(folder))
    monkeypatch.setattr("PIL.__version__", "99")
    monkeypatch.setattr(imagefolder, "decode", lambda *_: torch.zeros(3, 32, 32, dtype=torch.uint8))
    assert not data.load("imagefolder", str(folder)).train_x.any()


@pytest.mark.parametrize("name", ["a" * 255, "caf\udce9", "[x] y.z", "-"])
def test_folders_of_any_name_are_cached(folder: Path, name: str) -> None:
    first = data.load("imagefolder", str(folder.rename(folder.with_name(name))))
    (path,) = (folder.parent / "cache/drive-prune").iterdir()
    before = path.stat().st_ino
    assert same(data.load("imagefolder", str(folder.with_name(name))), first)
    assert [p.stat().st_ino for p in path.parent.iterdir()] == [before]


def test_cache_in_a_folder_of_any_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caf\udce9"))
    first = data.load("imagefolder", str(folder))
    assert len(list((tmp_path / "caf\udce9/drive-prune").iterdir())) == 1
    assert same(data.load("imagefolder", str(folder)), first)


def test_writers_at_once(folder: Path) -> None:
    first = anew(folder)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: data.load("imagefolder", str(folder)), range(8)))
    assert all(same(one, first) for one in found)
    (path,) = (folder.parent / "cache/drive-prune").iterdir()
    assert path.suffix == ".safetensors"


def test_without_a_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user of a container whom the system does not know."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    first = anew(folder)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    assert cache.cache_folder() is None
    assert same(data.load("imagefolder", str(folder)), first)
    with pytest.raises(InputError, match="--data-dir must be given with --data cifar10, got nothing"):
        data.load("cifar10")


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
