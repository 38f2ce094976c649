"""What the tests of experiments share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from images import image_folder

from drive.experiments.bench import inference
from drive.experiments.bench.turns import in_turns


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On images this small a second one would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10's place, taken by 300 images of two classes."""
    return image_folder(tmp_path_factory.mktemp("images"), count=150, size=(32, 32))


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The folder that commands run in; they set the number of threads, which is as before afterwards."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round of one call each, where `drive sparse-bench` measures inference."""
    monkeypatch.setattr(inference, "in_turns", lambda bursts, rounds: in_turns(bursts, 1, 0.0))
