"""Files of plans: the same bits again, without the model; damaged ones in one line."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import drive
from drive.sparse import freeze, load


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3), nn.MaxPool2d(2)
        )
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.features(x)
        return self.fc(features.mean((2, 3))), {"least": features.clamp(min=float("-inf"), max=3.0)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    model = Net().eval()
    masks = drive.Masks({n: torch.rand_like(p) < 0.3 for n, p in model.named_parameters() if p.dim() > 1})
    plan = freeze(model, masks, torch.randn(1, 3, 16, 16))
    plan.save(tmp_path / "plan.safetensors")
    x = torch.randn(2, 3, 20, 12)
    logits, more = plan(x)
    safetensors.torch.save_file({"x": x, "logits": logits, "least": more["least"]}, tmp_path / "expected")
    return tmp_path / "plan.safetensors"


def test_the_same_bits(file: Path):
    expected = safetensors.torch.load_file(file.parent / "expected")
    plan = load(file)
    logits, more = plan(expected["x"])
    assert torch.equal(logits, expected["logits"])
    assert torch.equal(more["least"], expected["least"])
    assert "3 weights with masks" in plan.report
    plan.save(file.parent / "again")
    assert torch.equal(load(file.parent / "again")(expected["x"])[0], logits)


def test_weights_take_their_non_zeros(tmp_path: Path):
    model = nn.Sequential(nn.Conv2d(64, 256, 3)).eval()
    weight = model[0].weight
    mask = torch.rand_like(weight) < 0.1
    freeze(model, {"0.weight": mask}, torch.randn(1, 64, 8, 8)).save(tmp_path / "plan")
    assert (tmp_path / "plan").stat().st_size < weight.numel() * (0.1 * 4 + 1 / 8) * 1.1 + 20_000


def rewritten(file: Path, **changes: str) -> None:
    with safetensors.safe_open(file, framework="pt") as opened:
        metadata, tensors = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    safetensors.torch.save_file(tensors, file, {**metadata, **changes})


def test_foreign_and_later_files(file: Path):
    rewritten(file, version="2")
    with pytest.raises(ValueError, match="load: .* is not a readable plan: its version must be 1, got '2'"):
        load(file)
    safetensors.torch.save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(
        ValueError, match="not a readable plan: its format must be 'drive.sparse plan', got None"
    ):
        load(file)
    with pytest.raises(FileNotFoundError):
        load(file.parent / "none")


def test_ops_that_are_not_known(file: Path):
    with safetensors.safe_open(file, framework="pt") as opened:
        graph = json.loads(opened.metadata()["graph"])
    for target in (
        "os.system",
        "operator.__import__",
        "aten.no_such_op.default",
        "builtins.eval",
        "aten.from_file.default",
    ):
        graph["nodes"][0][3]["dict"]["target"] = target
        rewritten(file, graph=json.dumps(graph))
        with pytest.raises(ValueError, match=f"ops must be known to this PyTorch, got '{target}'"):
            load(file)


def test_guards_are_read_not_run(file: Path):
    with safetensors.safe_open(file, framework="pt") as opened:
        graph = json.loads(opened.metadata()["graph"])
    graph["guards"] = ["__import__('os').remove('x')"]
    rewritten(file, graph=json.dumps(graph))
    with pytest.raises(ValueError, match="freeze: sizes must be with"):
        load(file)(torch.randn(1, 3, 16, 16))


def test_damaged_files(file: Path):
    """A byte changed, or the end missing: one line, or a plan that was not hit."""
    whole, draw = file.read_bytes(), random.Random(0)
    for _ in range(150):
        damaged = bytearray(whole)
        if draw.random() < 0.3:
            del damaged[draw.randrange(len(whole)) :]
        else:
            damaged[draw.randrange(len(whole) - 2000)] = draw.randrange(256)
        file.write_bytes(damaged)
        try:
            load(file)
        except ValueError as error:
            assert str(error).startswith("load: ")
            assert "\n" not in str(error)
