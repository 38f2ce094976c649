"""What runs read again: damaged, crafted, or of another version, it is one line with the file's name."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mutations import mutated

from drive.experiments.paper.queue import Experiment
from drive.experiments.runs.folder import Run, open_run
from drive.experiments.runs.inputs import InputError
from drive.experiments.runs.stored import load_tensors, read_stamped, save_tensors, write_stamped

VALUE = {"command": "train", "options": {"lr": 0.1, "data": "digits"}, "read": {}, "made_with": {}}
REMEDY = "delete it"


def options(given: dict[str, object]) -> dict[str, object]:
    return {"lr": 0.1, "data": "digits", **given}


def resumed(folder: Path) -> Run:
    with open_run("train", folder, True, {}, options) as run:
        return run


def test_stamped_values_come_back(tmp_path: Path) -> None:
    value = {"a": (1, 2), "b": {3: None, 11: 0.1}, "c": "é\udce9", "nan": [float("inf")]}
    write_stamped(tmp_path / "file", "some.v1", value)
    found = read_stamped(tmp_path / "file", "some.v1", REMEDY)
    assert found == {"a": [1, 2], "b": {"3": None, "11": 0.1}, "c": "é\udce9", "nan": [float("inf")]}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "Expecting value"),
        (b"[" * 100_000, "recursion"),
        (b"[]", "one without a format"),
        (b'{"format": "some.v2"}', "the format 'some.v2'"),
        (b'{"format": "some.v1"}', "one that was damaged or changed"),
        (b'{"\xff', "can't decode byte 0xff"),
        (None, "no such file"),
    ],
)
def test_what_is_no_stamped_file(tmp_path: Path, content: bytes | None, why: str) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_stamped(path, "some.v1", REMEDY)
    message = str(caught.value)
    assert message.startswith(f"{path} must be a file of the format some.v1, got ") and why in message
    assert message.endswith(": delete it") and "\n" not in message


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
@pytest.mark.parametrize("read", [lambda path: read_stamped(path, "some.v1", REMEDY), load_tensors])
def test_what_is_no_file(
    tmp_path: Path, make: Callable[[Path], None], read: Callable[[Path], object]
) -> None:
    make(tmp_path / "there")
    with pytest.raises(InputError, match=r"there must be a .* got .*must be a regular file"):
        read(tmp_path / "there")


def test_a_checkpoint_of_another_version(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": {}, "format": "drive.checkpoint.v9"}, path)
    with pytest.raises(InputError, match=r"got its format is 'drive.checkpoint.v9'"):
        load_tensors(path)
    torch.save({"model": {}}, path)  # anybody's
    assert load_tensors(path) == {"model": {}}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    write_stamped(tmp_path / "config.json", "drive.run.v1", VALUE)
    return tmp_path


def test_mutated_configs(run_folder: Path) -> None:
    path = run_folder / "config.json"
    content = path.read_bytes()
    assert resumed(run_folder).options == VALUE["options"]
    for number in range(2000):
        path.write_bytes(mutated(content, random.Random(number)))
        try:
            assert resumed(run_folder).options == VALUE["options"]
        except InputError as error:
            assert str(path) in str(error)


def test_mutated_results(tmp_path: Path) -> None:
    folder = tmp_path / "cells" / "cell"
    folder.mkdir(parents=True)
    path, value = folder / "result.json", {"correct": 3, "kept": {"a": 1}}
    write_stamped(path, "drive.result.v1", value)
    content = path.read_bytes()

    class Cell:
        name = "cell"

    experiment = Experiment(tmp_path, [], lambda name: pytest.fail("loaded"))
    assert experiment.result(Cell()) == value  # type: ignore[type-var]
    for number in range(2000):
        path.write_bytes(mutated(content, random.Random(number)))
        try:
            assert experiment.result(Cell()) == value  # type: ignore[type-var]
        except InputError as error:
            assert f"{path} must be" in str(error) and "delete it" in str(error)


def test_mutated_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    value = {"model": {"weight": torch.arange(8.0)}, "history": [(1, 0.5)]}
    save_tensors(path, value)
    content = path.read_bytes()
    for number in range(2000):
        path.write_bytes(mutated(content, random.Random(number)))
        try:
            found = load_tensors(path)
        except InputError as error:
            assert f"{path} must be" in str(error) and "\n" not in str(error)
        else:
            assert isinstance(found["model"], dict)
