"""Data sets and batches: shapes, statistics, seeding, broken images."""

import shutil
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from images import image_folder

from drive.experiments.data import sources as data
from drive.experiments.data.batches import Batches, crop_and_flip
from drive.experiments.data.dataset import Dataset
from drive.experiments.runs.inputs import InputError

ARCHIVE = Path(__file__).parents[2] / "../shared/data/cifar10.tar.gz"


@pytest.fixture
def digits() -> Dataset:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    return data.load("digits")


def random_dataset(count: int = 40, channels: int = 3, side: int = 32) -> Dataset:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=rng)
    labels = torch.arange(count) % 2
    return Dataset(images, labels, images[:10], labels[:10], classes=2, augment=channels == 3)


@pytest.mark.parametrize(("name", "side"), [("imagefolder", 64), ("tinyimagenet", 64), ("imagenet32", 32)])
def test_sides_of_large_images(tmp_path: Path, name: str, side: int) -> None:
    found = data.load(name, str(image_folder(tmp_path, size=(120, 90))))
    assert found.train_x.shape == (8, 3, side, side) and found.test_x.shape == (8, 3, side, side)


def test_digits_split_is_fixed(digits: Dataset) -> None:
    assert digits.train_x.shape == (1437, 1, 8, 8) and digits.test_x.shape == (360, 1, 8, 8)
    assert digits.train_x.dtype == torch.uint8 and int(digits.train_x.max()) == 16
    assert sorted(set(digits.test_y.tolist())) == list(range(10))
    assert digits.fingerprint == data.load("digits").fingerprint
    assert not digits.augment


def test_statistics_are_those_of_the_training_set() -> None:
    dataset = random_dataset()
    mean, std = dataset.statistics
    pixels = dataset.train_x.double()
    torch.testing.assert_close(mean.flatten(), pixels.mean((0, 2, 3)).float())
    torch.testing.assert_close(std.flatten(), pixels.std((0, 2, 3), correction=0).float())


def test_images_of_one_colour_stay_finite() -> None:
    black = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    dataset = Dataset(black, torch.zeros(4).long(), black, torch.zeros(4).long(), classes=2, augment=False)
    images, _ = next(Batches(dataset, 2, 0).epoch(0))
    assert torch.equal(images, torch.zeros(2, 3, 8, 8))


def test_batches_depend_on_seed_epoch_and_stream_only(digits: Dataset) -> None:
    def labels(seed: int, epoch: int, stream: str = "train") -> torch.Tensor:
        torch.rand(3)  # the global RNG has no part in it
        return torch.cat([y for _, y in Batches(digits, 100, seed).epoch(epoch, stream)])

    first = labels(0, 0)
    assert len(first) == 1400 and torch.equal(first, labels(0, 0))
    for other in (labels(1, 0), labels(0, 1), labels(0, 0, "prune")):
        assert not torch.equal(first, other)


def test_every_image_at_most_once_an_epoch() -> None:
    dataset = random_dataset(count=23, channels=1)
    seen = torch.cat([x.flatten(1) for x, _ in Batches(dataset, 5, 0).epoch(0)])
    assert len(seen) == 20 and len(seen.unique(dim=0)) == 20


def test_fewer_images_than_a_batch() -> None:
    batches = Batches(random_dataset(count=3, channels=1), 8, 0)
    assert len(batches) == 1 and [len(y) for _, y in batches.epoch(0)] == [3]


def test_endless_batches_are_fresh_and_counted() -> None:
    counted: list[int] = []
    batches = Batches(random_dataset(), 20, 0)
    stream = batches.endless("prune", lambda: counted.append(1))
    epochs = [torch.cat([next(stream)[0] for _ in range(len(batches))]) for _ in range(2)]
    assert len(counted) == 4 and not torch.equal(*epochs)


def test_crop_and_flip_shows_a_shifted_perhaps_mirrored_image() -> None:
    images = random_dataset(count=16).train_x
    rng = torch.Generator().manual_seed(1)
    shifts, mirrored = torch.randint(0, 9, (2, 16), generator=rng), torch.arange(16) % 2 == 0
    changed = crop_and_flip(images, shifts, mirrored, padding=4)
    assert changed.shape == images.shape and changed.dtype == torch.uint8 and changed.is_contiguous()
    padded = torch.nn.functional.pad(images, (4,) * 4)
    for index, (before, after) in enumerate(zip(padded, changed, strict=True)):
        y, x = shifts[:, index].tolist()
        window = before[:, y : y + 32, x : x + 32]
        assert torch.equal(after, window.flip(2) if mirrored[index] else window)


def test_limited_takes_a_fixed_mixed_choice(digits: Dataset) -> None:
    small = digits.limited(200)
    assert len(small.train_y) == 200 and len(set(small.train_y.tolist())) == 10
    assert torch.equal(small.train_x, digits.limited(200).train_x)
    assert len(digits.limited(10**6).train_y) == 1437


def test_image_folder(tmp_path: Path) -> None:
    found = data.load("imagefolder", str(image_folder(tmp_path)))
    assert found.train_x.shape == (8, 3, 32, 32) and found.train_x.dtype == torch.uint8
    assert found.train_y.tolist() == [0] * 4 + [1] * 4 == found.test_y.tolist()
    assert found.train_x[0, :, 5, 5].tolist() == [0, 0, 200] and found.augment and found.classes == 2


def test_large_images_become_64_pixels(tmp_path: Path) -> None:
    assert data.load("imagefolder", str(image_folder(tmp_path, size=(90, 120)))).side == 64


def test_corrupt_images_are_left_out_by_name(tmp_path: Path) -> None:
    folder = image_folder(tmp_path)
    whole = (folder / "train/red/0.png").read_bytes()
    (folder / "train/blue/0.png").write_bytes(b"")  # also the first file, which settles the size
    (folder / "train/red/1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "val/red/3.png").write_text("no image")
    (folder / "val/red/notes.txt").write_text("not even called one")
    found = data.load("imagefolder", str(folder))
    assert sorted(found.skipped) == [
        ("train/blue/0.png", "broken or no image"),
        ("train/red/1.png", "broken or no image"),
        ("val/red/3.png", "broken or no image"),
        ("val/red/notes.txt", "without the suffix of an image"),
    ]
    assert found.train_y.tolist() == [0] * 3 + [1] * 3 and len(found.test_y) == 7


@pytest.mark.parametrize("missing", ["train", "val", "train/red"])
def test_image_folder_of_another_layout(tmp_path: Path, missing: str) -> None:
    folder = image_folder(tmp_path)
    shutil.rmtree(folder / missing)
    with pytest.raises(InputError, match="--data-dir must"):
        data.load("imagefolder", str(folder))


def test_image_folder_without_a_readable_image(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, count=1)
    for path in folder.glob("val/*/*"):
        path.write_bytes(b"broken")
    with pytest.raises(InputError, match="--data-dir must have a readable image to test, got none; left out"):
        data.load("imagefolder", str(folder))


@pytest.mark.parametrize(("name", "module"), [("digits", "sklearn"), ("cifar10", "torchvision")])
def test_missing_package_names_its_extra(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for loaded in [m for m in sys.modules if m.partition(".")[0] == module] + [module]:
        monkeypatch.setitem(sys.modules, loaded, None)
    extra = {"sklearn": "experiments", "torchvision": "vision"}[module]
    with pytest.raises(
        InputError, match=rf"{module} must be installed \(pip install 'drive-prune\[{extra}\]'\)"
    ):
        data.load(name)


def test_real_photographs(tmp_path: Path) -> None:
    if not ARCHIVE.exists():
        pytest.skip(f"no {ARCHIVE.name}: real photographs are not at hand")
    with tarfile.open(ARCHIVE) as archive:
        kept = ("train/airplane/000", "train/cat/000", "test/airplane/000", "test/cat/000")
        for member in archive:
            if member.isfile() and member.name.startswith(kept):
                path = tmp_path / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                content = archive.extractfile(member)
                assert content is not None
                path.write_bytes(content.read())
    found = data.load("imagefolder", str(tmp_path))
    assert found.train_x.shape == (20, 3, 32, 32) and not found.skipped
    images, _ = next(Batches(found, 20, 0).epoch(0))
    assert images.dtype == torch.float32 and abs(float(images.mean())) < 0.5
