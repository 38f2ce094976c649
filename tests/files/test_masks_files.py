"""Files that are not what they say: damaged, crafted, of another kind. One line each, and no memory taken."""

from __future__ import annotations

import json
import os
import random
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from mutations import mutated
from safetensors.torch import load_file, save_file
from torch import nn

import drive
from drive import Masks

UNREADABLE = r"^Masks.load: .*{} is not a readable masks file: "


def write(path: Path, shapes: object, *, tensor: torch.Tensor | None = None, **metadata: str) -> None:
    """A file of one tensor "a", of eight bits, with these shapes: as JSON, or text as it is."""
    text = shapes if isinstance(shapes, str) else json.dumps(shapes)
    tensor = torch.zeros(1, dtype=torch.uint8) if tensor is None else tensor
    save_file({"a": tensor}, path, {"format": "drive.masks.v1", "shapes": text, **metadata})


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file, changed mostly in its header; in half of them the length of that is put right."""
    head = 8 + int.from_bytes(content[:8], "little")
    found = mutated(content, rng, head)
    if rng.random() < 0.5:
        size = len(found) - (len(content) - head)
        found = size.to_bytes(8, "little", signed=True) + found[8:]
    return found


@contextmanager
def overwritten(path: Path) -> Iterator[Callable[[bytes], object]]:
    """Gives a file other contents, one after the other: without emptying it, which a disk takes a ms for."""
    with path.open("wb", buffering=0) as file:
        yield lambda content: (file.seek(0), file.write(content), file.truncate())


SHAPES = {
    "a list": ["a"],
    "nothing": None,
    "a number": 3,
    "of no tensor": {},
    "of another tensor": {"b": [8]},
    "of one tensor more": {"a": [8], "b": [8]},
    "no list": {"a": 8},
    "words": {"a": "8"},
    "lists": {"a": [[8]]},
    "half an entry": {"a": [8.0]},
    "true": {"a": [True]},
    "negative": {"a": [-8]},
    "negative, positive as a product": {"a": [-2, -4]},
    "other sizes": {"a": [9]},
    "huge": {"a": [2**60]},
    "beyond 64 bits": {"a": [2**64 + 8]},
    "a product beyond 64 bits": {"a": [2**32, 2**32]},
    "many dimensions": {"a": [8] + [1] * 100},
    "no JSON": "{",
    "not a number": '{"a": [NaN]}',
    "infinite": '{"a": [1e999]}',
    "digits": '{"a": [' + "9" * 5000 + "]}",
    "nested lists": "[" * 100_000,
    "nested objects": '{"a":' * 100_000,
    "a name of half a character": '{"\\ud800": [8]}',
}


@pytest.mark.parametrize("case", SHAPES)
def test_shapes_that_are_none(tmp_path: Path, case: str):
    write(tmp_path / "x", SHAPES[case])
    with pytest.raises(ValueError, match=UNREADABLE.format("x")) as raised:
        Masks.load(tmp_path / "x")
    assert len(str(raised.value)) < 400, "one line, whatever the file holds"


@pytest.mark.parametrize("shape", ([0, 2**62, 4], [2**32, 0, 2**32], [2**63, 0]))
def test_shapes_without_entries_that_overflow_all_the_same(tmp_path: Path, shape: list[int]):
    write(tmp_path / "x", {"a": shape}, tensor=torch.zeros(0, dtype=torch.uint8))
    with pytest.raises(ValueError, match=UNREADABLE.format("x")):
        Masks.load(tmp_path / "x")


@pytest.mark.parametrize(
    "dtype", (torch.bool, torch.int8, torch.float32, torch.bfloat16, torch.float8_e4m3fn)
)
def test_tensors_that_are_no_bits(tmp_path: Path, dtype: torch.dtype):
    write(tmp_path / "x", {"a": [8]}, tensor=torch.zeros(1).to(dtype))
    with pytest.raises(ValueError, match="a must hold 8 bits, got "):
        Masks.load(tmp_path / "x")


@pytest.mark.parametrize(
    "parameters", ("-1", "true", "1.0", "1e999", '"8"', "[8]", str(2**63), "{", "[" * 100_000)
)
def test_parameters_that_are_no_number(tmp_path: Path, parameters: str):
    write(tmp_path / "x", {"a": [8]}, parameters=parameters)
    with pytest.raises(ValueError, match=UNREADABLE.format("x")):
        Masks.load(tmp_path / "x")


@pytest.mark.parametrize("version", ("drive.masks.v2", "", "v1"))
def test_another_version_is_named(tmp_path: Path, version: str):
    save_file(
        {"a": torch.zeros(1, dtype=torch.uint8)}, tmp_path / "x", {"format": version, "shapes": '{"a": [8]}'}
    )
    with pytest.raises(ValueError, match=f"its format must be 'drive.masks.v1', got '{version}'"):
        Masks.load(tmp_path / "x")


@pytest.mark.parametrize("kind", ("folder", "FIFO", "device", "empty", "metadata of numbers", "no metadata"))
@pytest.mark.parametrize("reader", ("Masks.load", "rebuild"))
def test_what_is_no_such_file(tmp_path: Path, kind: str, reader: str):
    path = tmp_path / "x"
    if kind == "folder":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path = Path(os.devnull)
    elif kind == "empty":
        path.touch()
    elif kind == "no metadata":
        save_file({"a": torch.zeros(1)}, path)
    else:
        header = b'{"__metadata__": {"format": 1}}'
        path.write_bytes(len(header).to_bytes(8, "little") + header)
    model = nn.Linear(2, 2)
    read = {
        "Masks.load": lambda: Masks.load(path),
        "rebuild": lambda: drive.rebuild(model, path, torch.ones(1, 2)),
    }
    found: list[BaseException] = []

    def work() -> None:
        with pytest.raises(ValueError, match=f"^{reader}: {path} is not a readable ") as raised:
            read[reader]()
        found.append(raised.value)

    thread = threading.Thread(target=work, daemon=True)  # who waits for a FIFO waits for ever
    thread.start()
    thread.join(10)
    assert found


def test_links_and_names_of_bytes(tmp_path: Path):
    masks = Masks({"a": torch.tensor([True, False])})
    masks.save(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "nowhere").symlink_to("nothing")
    for path in (tmp_path / "link", str(tmp_path / "link"), os.fsencode(tmp_path / "link")):
        assert torch.equal(Masks.load(path)["a"], masks["a"])
    with pytest.raises(FileNotFoundError):
        Masks.load(tmp_path / "nowhere")


def test_nothing_is_allocated_for_what_is_not_there(tmp_path: Path):
    write(tmp_path / "x", {"a": [2**36]})
    tracemalloc.start()  # numpy tells it
    try:
        with pytest.raises(ValueError, match="a must hold 68719476736 bits"):
            Masks.load(tmp_path / "x")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_any_damage_to_masks_is_an_error_or_masks(tmp_path: Path):
    masks = Masks({"a.weight": torch.rand(3, 5) < 0.5, "b": torch.ones((), dtype=torch.bool)}, parameters=99)
    masks.save(tmp_path / "valid")
    content, rng, path = (tmp_path / "valid").read_bytes(), random.Random(0), tmp_path / "x"
    loaded = 0
    with overwritten(path) as put:
        for _ in range(2000):
            put(damaged(content, rng))
            try:
                found = Masks.load(path)
            except ValueError as error:
                assert str(path) in str(error)
                continue
            loaded += 1
            assert all(mask.dtype == torch.bool for mask in found.values())
            assert found.parameters is None or found.parameters >= 0
            assert 0 <= found.sparsity() <= 1
    assert 0 < loaded < 1000


def shrunk_file(path: Path) -> tuple[nn.Module, torch.Tensor]:
    """What `Shrunk.save` writes of a network without its second hidden unit, and a full one."""
    model, x = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), torch.ones(1, 2)
    stays = torch.tensor([True, False, True])
    cuts = [["0.weight", 0], ["0.bias", 0], ["1.weight", 1]]
    tensors = {f"kept.{number}": stays.clone() for number in range(len(cuts))}
    for name, tensor in model.state_dict().items():
        axis = dict(map(tuple, cuts)).get(name)
        small = tensor if axis is None else tensor.index_select(axis, stays.nonzero().flatten())
        tensors[f"weights.{name}"] = small.clone()
    save_file(tensors, path, {"drive-shrunk-1": json.dumps(cuts)})
    return model, x


def test_any_damage_to_a_shrunk_model_is_an_error_or_a_model(tmp_path: Path):
    model, x = shrunk_file(tmp_path / "valid")
    content, rng, path = (tmp_path / "valid").read_bytes(), random.Random(0), tmp_path / "x"
    rebuilt = 0
    with overwritten(path) as put:
        for _ in range(2000):
            put(damaged(content, rng))
            try:
                small = drive.rebuild(model, path, x)
            except ValueError as error:
                assert str(path) in str(error)
                continue
            rebuilt += 1
            assert small(x).shape == (1, 2)
    assert 0 < rebuilt < 1000


CUTS = {
    "no list": '{"0.weight": 0}',
    "no pairs": '["0.weight", "0.bias", "1.weight"]',
    "a name": '[[0, 0], ["0.bias", 0], ["1.weight", 1]]',
    "a negative axis": '[["0.weight", -2], ["0.bias", 0], ["1.weight", 1]]',
    "an axis of no tensor": '[["0.weight", 2], ["0.bias", 0], ["1.weight", 1]]',
    "true": '[["0.weight", false], ["0.bias", 0], ["1.weight", true]]',
    "twice": '[["0.weight", 0], ["0.weight", 0], ["1.weight", 1]]',
    "more than there are": '[["0.weight", 0], ["0.bias", 0], ["1.weight", 1], ["1.weight", 0]]',
    "nested": "[" * 100_000,
    "no JSON": "[[",
}


@pytest.mark.parametrize("case", CUTS)
def test_cuts_that_are_none(tmp_path: Path, case: str):
    model, x = shrunk_file(tmp_path / "x")
    content = (tmp_path / "x").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = {"drive-shrunk-1": CUTS[case]}
    text = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    with pytest.raises(ValueError, match="^rebuild: ") as raised:
        drive.rebuild(model, tmp_path / "x", x)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("key", "tensor"),
    (
        ("kept.0", torch.ones(3)),
        ("kept.0", torch.ones(3, 1, dtype=torch.bool)),
        ("kept.0", torch.zeros(3, dtype=torch.bool)),
        ("weights.0.weight", torch.ones(2, 2, dtype=torch.int32)),
        ("weights.0.weight", torch.ones(2, 3)),
    ),
)
def test_tensors_of_a_shrunk_model_that_are_others(tmp_path: Path, key: str, tensor: torch.Tensor):
    model, x = shrunk_file(tmp_path / "x")
    cuts = json.dumps([["0.weight", 0], ["0.bias", 0], ["1.weight", 1]])
    save_file({**load_file(tmp_path / "x"), key: tensor}, tmp_path / "y", {"drive-shrunk-1": cuts})
    with pytest.raises(ValueError, match="^rebuild: "):
        drive.rebuild(model, tmp_path / "y", x)


def test_another_version_of_shrunk_models_is_named(tmp_path: Path):
    save_file({"a": torch.zeros(1)}, tmp_path / "x", {"drive-shrunk-2": "[]"})
    with pytest.raises(ValueError, match="its metadata must be drive-shrunk-1, got drive-shrunk-2"):
        drive.rebuild(nn.Linear(2, 2), tmp_path / "x", torch.ones(1, 2))
