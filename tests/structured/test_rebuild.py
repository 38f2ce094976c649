"""Shrunk.save and drive.rebuild: the small model again, to the bit, from a full one that is built anew."""

from __future__ import annotations

import subprocess
import sys

import pytest
import safetensors.torch
import torch
from structured_cases import CASES, generic, need, outputs, thinned
from torch import nn

import drive

pytest.importorskip("torch_pruning")


@pytest.mark.parametrize(
    "case", ["cnn4", "resnet8", "torchvision mobilenet_v2", "Llama", "GPT-2", "torchvision ViT"]
)
def test_rebuilt_models_are_the_same_to_the_bit(case, tmp_path):
    need(case)
    torch.manual_seed(0)
    model, inputs = CASES[case]()
    generic(model)
    masks, _, _ = thinned(model, inputs)
    shrunk = drive.shrink(model, masks, inputs)
    shrunk.save(tmp_path / "small.safetensors")
    torch.manual_seed(1)
    fresh = CASES[case]()[0].double().eval()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    small = drive.rebuild(fresh, tmp_path / "small.safetensors", inputs)
    ours, theirs = small.state_dict(), shrunk.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    with torch.no_grad():
        for got, expected in zip(outputs(small, inputs), outputs(shrunk.model, inputs), strict=True):
            assert torch.equal(got, expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())
    tied = [len({id(p) for p in m.parameters()}) for m in (small, shrunk.model)]
    assert tied[0] == tied[1]


def small_one() -> tuple[nn.Module, torch.Tensor, drive.structured.shrink.Shrunk]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)), torch.randn(5, 6)
    masks = drive.Masks.dense(model)
    masks["0.weight"][[1, 4]] = False
    return model, x, drive.shrink(model, masks, x)


def test_it_goes_on_training_and_keeps_the_dtype_of_the_file(tmp_path):
    model, x, shrunk = small_one()
    model[2].weight.requires_grad_(False)
    shrunk.model.bfloat16()
    shrunk.save(tmp_path / "small.safetensors")
    small = drive.rebuild(model, tmp_path / "small.safetensors", x.bfloat16())
    assert small[0].weight.dtype == torch.bfloat16 and not small[2].weight.requires_grad
    small(x.bfloat16()).sum().backward()
    assert small[0].weight.grad.shape == (6, 6)


def test_no_torch_pruning_is_needed(tmp_path):
    _, _, shrunk = small_one()
    shrunk.save(tmp_path / "small.safetensors")
    code = (
        "import sys; sys.modules['torch_pruning'] = None\n"
        "import torch, drive\nfrom torch import nn\n"
        "fresh = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))\n"
        f"small = drive.rebuild(fresh, {str(tmp_path / 'small.safetensors')!r}, torch.randn(5, 6))\n"
        "assert small[0].out_features == 6\n"
        "try:\n    drive.shrink(fresh, drive.Masks.dense(fresh), torch.randn(5, 6))\n"
        "except ImportError as error:\n    assert 'drive-prune[structured]' in str(error)\n"
        "else:\n    raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_files_and_other_models_are_refused_in_a_line(tmp_path):
    model, x, shrunk = small_one()
    path = tmp_path / "small.safetensors"
    shrunk.save(path)
    with pytest.raises(FileNotFoundError):
        drive.rebuild(model, tmp_path / "none", x)
    wider = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 4))
    with pytest.raises(ValueError, match=r"0.weight must have 8 entries along axis 0, got \(9, 6\)"):
        drive.rebuild(wider, path, x)
    other = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4), nn.Linear(4, 4))
    with pytest.raises(
        ValueError, match=r"must be of this architecture: 3\.(weight|bias) is not as it is there"
    ):
        drive.rebuild(other, path, x)
    cut = path.read_bytes()
    path.write_bytes(cut[: len(cut) // 2])
    with pytest.raises(ValueError, match="is not a readable file of a shrunk model"):
        drive.rebuild(model, path, x)
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="its metadata must be drive-shrunk-1, got nothing"):
        drive.rebuild(model, path, x)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    _, _, shrunk = small_one()
    path = tmp_path / "small.safetensors"
    shrunk.save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        shrunk.save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_summary_names_all_sizes():
    _, _, shrunk = small_one()
    lines = shrunk.summary().splitlines()
    assert lines[1].split() == ["nodes", "8", "6", "75.0%"]
    assert lines[2].split() == ["parameters", "108", "82", "75.9%"]
    assert lines[3].split() == ["multiply-adds", "80", "60", "75.0%"]
    assert lines[4].split()[0] == "bytes"
