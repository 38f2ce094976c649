"""Damaged files of every kind that is read: the data they hold, or one line; never a traceback."""

from __future__ import annotations

import gzip
import pickle
import random
import shutil
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from images import image_folder
from mutations import mutated

from drive.experiments.data import sources as data
from drive.experiments.data.cache import cached
from drive.experiments.data.dataset import Dataset
from drive.experiments.runs.inputs import InputError


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes() + array.tobytes()


def mnist(folder: Path, zipped: bool = False) -> Path:
    """Three images of 4 x 4 pixels to train, and two to test."""
    folder.mkdir()
    for part, count in (("train", 3), ("t10k", 2)):
        images = np.arange(count * 16, dtype=np.uint8).reshape(count, 4, 4)
        for name, array in (("images-idx3", images), ("labels-idx1", np.arange(count, dtype=np.uint8))):
            path = folder / f"{part}-{name}-ubyte"
            if zipped:
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(idx(array), mtime=0))
            else:
                path.write_bytes(idx(array))
    return folder


def photos_in(folder: Path) -> Path:
    return image_folder(folder / "photos", count=1, size=(32, 32))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return photos_in(tmp_path)


def pack(photos: Path, path: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        archive.add(photos, ".")
    return path


# ---- kinds of damage


IMAGES = "train-images-idx3-ubyte"
LABELS = "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, b"", "which is none or cut off"),
        (IMAGES, idx(np.zeros((3, 4, 4), np.uint8))[:9], "which is none or cut off"),
        (IMAGES, idx(np.zeros((3, 4, 4), np.uint8)) + b"\0", "which is none or cut off"),
        (IMAGES, bytes([0, 0, 8, 3]) + b"\xff" * 12 + b"\0" * 48, "which is none or cut off"),
        (IMAGES, bytes([0, 0, 8, 3]) + b"\0\1\0\0" * 2 + b"\0" * 52, "which is none or cut off"),
        (IMAGES, idx(np.zeros((3, 4, 4), np.uint8)).replace(b"\x08", b"\x0d", 1), "which is none or cut off"),
        (LABELS, idx(np.zeros((3, 1), np.uint8)), "which is none or cut off"),
        (LABELS, idx(np.zeros(4, np.uint8)), "a label for each image, got 4 for 3"),
        (IMAGES, idx(np.zeros((3, 4, 5), np.uint8)), r"\[N, 1, H, H\] to train and test, got \[3, 1, 4, 5\]"),
        (IMAGES, idx(np.zeros((3, 8, 8), np.uint8)), r"got \[3, 1, 8, 8\] and \[2, 1, 4, 4\]"),
    ],
)  # fmt: skip
def test_idx_files_of_another_content(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    folder = mnist(tmp_path / "mnist")
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        data.load("mnist", str(folder))


@pytest.mark.parametrize("images", [np.zeros((0, 4, 4), np.uint8), np.zeros((3, 0, 0), np.uint8)])
def test_idx_files_without_images(tmp_path: Path, images: np.ndarray) -> None:
    folder = mnist(tmp_path / "mnist")
    (folder / IMAGES).write_bytes(idx(images))
    (folder / LABELS).write_bytes(idx(np.zeros(len(images), np.uint8)))
    with pytest.raises(InputError, match="--data-dir must hold "):
        data.load("mnist", str(folder))


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-1], lambda b: b[:12], lambda b: b"", lambda b: b[:-8] + b"\1" * 8,
     lambda b: b[:12] + b"\xff" * 4 + b[16:]],
    ids=["cut off", "the header", "empty", "checksum", "deflate"],
)  # fmt: skip
def test_gzip_that_is_damaged(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    folder = mnist(tmp_path / "mnist", zipped=True)
    path = folder / f"{IMAGES}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=f"{IMAGES}.gz, which is none or cut off"):
        data.load("mnist", str(folder))


@pytest.mark.parametrize("name", [IMAGES, LABELS, "t10k-labels-idx1-ubyte"])
def test_a_folder_in_place_of_an_idx_file(tmp_path: Path, name: str) -> None:
    folder = mnist(tmp_path / "mnist")
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(InputError, match="--data-dir must "):
        data.load("mnist", str(folder))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def urlopen(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


BATCHES = "cifar-10-batches-py"


@pytest.mark.parametrize("place", ["nothing", "text", "folders", "a file", "an archive"])
def test_cifar_that_is_none(tmp_path: Path, place: str, no_network: None) -> None:
    pytest.importorskip("torchvision", reason="CIFAR is read by torchvision")
    for name in ("data_batch_1", "batches.meta"):
        path = tmp_path / BATCHES / name
        if place == "text":
            path.parent.mkdir(exist_ok=True)
            path.write_text("text")
        elif place == "folders":
            path.mkdir(parents=True)
    if place == "a file":
        (tmp_path / BATCHES).write_text("text")
    elif place == "an archive":
        (tmp_path / "cifar-10-python.tar.gz").write_text("text")
    with pytest.raises(
        InputError, match=r"--data-dir must hold cifar10 or be a folder to download it to, got"
    ):
        data.load("cifar10", str(tmp_path))


WHOLE = {"data": np.zeros((1, 3072), np.uint8), "labels": [0], "label_names": ["a", "b"]}


@pytest.mark.parametrize(
    "content",
    [b"", b"text", pickle.dumps([]), pickle.dumps({}), pickle.dumps(WHOLE)[:-9],
     pickle.dumps({**WHOLE, "data": np.zeros((1, 3), np.uint8)}), pickle.dumps({**WHOLE, "labels": ["a"]}),
     pickle.dumps({**WHOLE, "label_names": 3}), b"cnowhere\nnothing\n."],
)  # fmt: skip
def test_cifar_of_another_content(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    """Of files whose checksum fits, which torchvision compares before it reads them."""
    cifar = pytest.importorskip("torchvision.datasets.cifar", reason="CIFAR is read by torchvision")
    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)
    (tmp_path / BATCHES).mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        (tmp_path / BATCHES / name).write_bytes(pickle.dumps(WHOLE))
    assert len(data.load("cifar10", str(tmp_path)).train_y) == 5
    (tmp_path / BATCHES / "data_batch_3").write_bytes(content)
    (tmp_path / BATCHES / "batches.meta").write_bytes(content)
    with pytest.raises(
        InputError, match=r"--data-dir must hold cifar10 or be a folder to download it to, got"
    ):
        data.load("cifar10", str(tmp_path))


def blocks(photos: Path, path: Path) -> tuple[bytes, int]:
    """An archive, and where in it the header of its last file begins."""
    with tarfile.open(pack(photos, path)) as archive:
        return path.read_bytes(), archive.getmembers()[-1].offset


@pytest.mark.parametrize(
    "damage",
    [
        lambda b, last: b[:last],
        lambda b, last: b[: last + 100],
        lambda b, last: b[: last + 512],
        lambda b, last: b[:last] + b"x" + b[last + 1 :],
        lambda b, last: b + b,
        lambda b, last: b[: b.rindex(b"IEND") + 300],
        lambda b, last: b"",
    ],
    ids=["at a file", "in a header", "in a file", "a header", "two archives", "no end", "empty"],
)
@pytest.mark.parametrize("compress", [lambda b: b, gzip.compress], ids=["tar", "gzip"])
def test_archives_that_are_not_whole(
    photos: Path, damage: Callable[[bytes, int], bytes], compress: Callable[[bytes], bytes]
) -> None:
    path = photos.with_name("x.tar")
    path.write_bytes(compress(damage(*blocks(photos, path))))
    with pytest.raises(InputError, match="must be a folder or a tar archive of one, got .*x.tar"):
        data.load("cifar10", str(path))


def test_the_checksum_of_a_compressed_archive(photos: Path) -> None:
    path = pack(photos, photos.with_name("x.tar.gz"), "w:gz")
    path.write_bytes(path.read_bytes()[:-8] + b"\1" * 8)
    with pytest.raises(InputError, match="must be a folder or a tar archive of one, got .*CRC"):
        data.load("cifar10", str(path))


def member(name: str, kind: bytes, to: str = "") -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, to
    return found


@pytest.mark.parametrize(
    "added",
    [member("train/red/x.png", tarfile.SYMTYPE, "/etc/passwd"),
     member("train/red/x", tarfile.SYMTYPE, "../../../.."),
     member("train/red/x.png", tarfile.LNKTYPE, "gone.png"), member("train/red/x.png", tarfile.FIFOTYPE),
     member("train/red/x.png", tarfile.CHRTYPE), member("../x.png", tarfile.REGTYPE),
     member("train/red/0.png/x.png", tarfile.REGTYPE)],
    ids=lambda found: f"{found.type.decode()} {found.name}",
)  # fmt: skip
def test_archives_with_what_they_must_not_hold(photos: Path, added: tarfile.TarInfo) -> None:
    path = pack(photos, photos.with_name("x.tar"))
    with tarfile.open(path, "a") as archive:
        archive.addfile(added)
    with pytest.raises(InputError, match="must be a folder or a tar archive of one, got .*x.tar"):
        data.load("cifar10", str(path))
    assert not (photos.parent / "x.png").exists()


def test_links_and_other_files_in_archives(photos: Path) -> None:
    shutil.move(photos / "train/red", photos / "red")
    (photos / "train/red").symlink_to("../red")
    (photos / "train/blue/9.png").symlink_to("0.png")
    (photos / "train/blue/gone.png").symlink_to("nowhere.png")
    (photos / "train/blue/notes.txt").write_text("")
    (photos.parent / "._photos").write_text("as a Mac adds them")
    path = photos.with_name("x.tar")
    with tarfile.open(path, "w") as archive:
        for name in ("._photos", "photos"):
            archive.add(photos.parent / name, name)
    found, same = data.load("imagefolder", str(path)), data.load("imagefolder", str(photos))
    assert torch.equal(found.train_x, same.train_x) and found.train_y.tolist() == [0, 0, 1]
    assert found.skipped == same.skipped and len(found.skipped) == 2


# ---- bytes of any content


def check(found: Dataset) -> None:
    for images, labels in ((found.train_x, found.train_y), (found.test_x, found.test_y)):
        assert images.dtype == torch.uint8 and images.shape[1:] == found.train_x.shape[1:]
        assert images.shape[2] == images.shape[3] and labels.dtype == torch.int64
        assert labels.shape == images.shape[:1] and len(labels) > 0
        assert int(labels.min()) >= 0 and int(labels.max()) < found.classes


def loads(path: Path, count: int, name: str, folder: Path) -> Iterator[Dataset | None]:
    """The data of a folder, each time with other bytes in one of its files: None if they are refused."""
    whole = path.read_bytes()
    for seed in range(count):
        path.write_bytes(mutated(whole, random.Random(seed)))
        try:
            found = data.load(name, str(folder))
        except InputError as error:
            assert len(str(error)) < 1000
            yield None
        else:
            check(found)
            yield found
    path.write_bytes(whole)


def outcomes(found: Iterator[Dataset | None]) -> set[bool]:
    return {one is not None for one in found}


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder for files that are written a hundred times, past the disk where the system has that."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else tmp_path) as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)  # archives are unpacked there
        monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
        yield Path(folder)


@pytest.mark.parametrize("zipped", [False, True])
def test_any_idx_file(memory: Path, zipped: bool) -> None:
    folder = mnist(memory / "mnist", zipped)
    seen = [outcomes(loads(path, 250, "mnist", folder)) for path in sorted(folder.iterdir())]
    assert seen == [{False, True}] * 4


def test_any_annotations(memory: Path) -> None:
    photos = photos_in(memory)
    (photos / "val/images").mkdir()
    for name in ("red", "blue"):
        (photos / "val" / name / "0.png").rename(photos / "val/images" / f"{name}.png")
        (photos / "val" / name).rmdir()
    path = photos / "val/val_annotations.txt"
    path.write_text("red.png\tred\t0\t0\t62\t62\nblue.png\tblue\t0\t0\t62\t62\n")
    assert outcomes(loads(path, 2000, "imagefolder", photos)) == {False, True}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
def test_any_archive(memory: Path, mode: str) -> None:
    path = pack(photos_in(memory), memory / "photos.tar", mode)
    assert False in outcomes(loads(path, 500, "imagefolder", path))


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp", "pgm"])
def test_any_image(memory: Path, suffix: str) -> None:
    image = pytest.importorskip("PIL.Image", reason="images are decoded by Pillow")
    photos = photos_in(memory)
    path = photos / f"train/red/1.{suffix}"
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    image.fromarray(pixels).save(path)
    assert outcomes(loads(path, 100, "imagefolder", photos)) == {True}


def test_any_cache(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never other images than those of the folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(memory))
    y = torch.arange(2)
    images = torch.arange(2 * 3 * 4, dtype=torch.uint8).view(2, 3, 2, 2)
    first = Dataset(images, y, images.flip(0), y.clone(), classes=2, augment=True, skipped=(("x", "broken"),))
    source = memory / "photos"
    assert cached(source, None, [], lambda: first) is first
    (path,) = (memory / "drive-prune").iterdir()
    whole = path.read_bytes()
    for seed in range(2000):
        path.write_bytes(mutated(whole, random.Random(seed)))
        found = cached(source, None, [], lambda: first)
        assert found.fingerprint == first.fingerprint
        assert (found.classes, found.skipped, found.augment) == (2, first.skipped, True)
