"""Masks: applying, attaching to training, bit-packed files."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import nn

import drive
from drive import Masks, fused_drive_prune

LAYERS = ("0.weight", "2.weight")


def pruned_model(sparsity: float = 0.9) -> tuple[nn.Sequential, Masks]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    step(model)
    masks = fused_drive_prune(model, sparsity=sparsity).masks
    model.zero_grad()
    return model, masks


def step(model: nn.Module) -> None:
    nn.functional.cross_entropy(model(torch.randn(16, 20)), torch.randint(4, (16,))).backward()


def assert_pruned_are_zero(model: nn.Module, masks: Masks) -> None:
    for name in LAYERS:
        weight = model.get_parameter(name)
        assert not weight[~masks[name]].any(), name
        assert weight[masks[name]].all(), f"{name}: the others train"


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "adamw, for each": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
}


@pytest.mark.parametrize("given", (True, False))
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_attached_weights_stay_zero(name: str, given: bool):
    model, masks = pruned_model(0.0)
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(3):  # momentum from before the pruning
        step(model)
        optimizer.step()
    masks = fused_drive_prune(model, sparsity=0.9).masks
    with masks.attach(model, optimizer if given else None):
        for _ in range(5):
            optimizer.zero_grad()
            step(model)
            for layer in LAYERS:
                assert not model.get_parameter(layer).grad[~masks[layer]].any(), "norms see the sparse model"
            optimizer.step()
            assert_pruned_are_zero(model, masks)
    for layer in LAYERS:
        for state in optimizer.state[model.get_parameter(layer)].values():
            if isinstance(state, torch.Tensor) and state.dim():
                assert not state[~masks[layer]].any()


def test_weight_decay_alone_and_dead_values_do_not_revive():
    model, masks = pruned_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    handle = masks.attach(model, optimizer)
    with torch.no_grad():
        model[0].weight.fill_(-torch.inf)  # inf * 0 would be NaN
    optimizer.step()
    assert not model[0].weight[~masks["0.weight"]].any()
    assert not model[0].weight[~masks["0.weight"]].signbit().any()
    handle.remove()
    with torch.no_grad():
        model[0].weight.fill_(1)
    step(model)
    optimizer.step()
    assert model[0].weight.all(), "removed: nothing is watched any more"


def test_attachment_follows_further_pruning():
    model, masks = pruned_model(0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with masks.attach(model, optimizer):
        step(model)
        fused_drive_prune(model, sparsity=0.9, masks=masks)
        optimizer.step()
        assert_pruned_are_zero(model, masks)
        assert masks.sparsity() == pytest.approx(0.9, abs=1e-3)


def test_global_hook_leaves_other_models_alone():
    model, masks = pruned_model()
    other = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with masks.attach(model):
        other(torch.randn(2, 3)).sum().backward()
        optimizer.step()
    assert other.weight.all()


def test_attach_works_under_torch_compile():
    model, masks = pruned_model()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1, momentum=0.9)
    with masks.attach(compiled, optimizer):
        for _ in range(2):
            step(compiled)
            optimizer.step()
    assert_pruned_are_zero(model, masks)


def test_apply_is_exact_and_in_place():
    model, masks = pruned_model()
    with torch.no_grad():
        model[0].weight.fill_(torch.nan)
    pointer = model[0].weight.data_ptr()
    assert masks.apply_(model) is masks
    assert model[0].weight.data_ptr() == pointer
    dead = model[0].weight[~masks["0.weight"]]
    assert torch.equal(dead, torch.zeros_like(dead)) and not dead.signbit().any()
    assert masks.apply_(dict(model.named_parameters())) is masks


def test_apply_is_seen_by_what_keeps_copies_of_weights():
    model, masks = pruned_model()
    inputs = torch.randn(8, 20)
    sparse = drive.sparse.SparseLinear.from_dense(model[0], masks["0.weight"])
    with torch.no_grad():
        sparse(inputs)
        further = Masks({"weight": masks["0.weight"] & (torch.rand(30, 20) < 0.5)})
        further.apply_(sparse)
        expected = nn.functional.linear(inputs, model[0].weight * further["weight"], model[0].bias)
        torch.testing.assert_close(sparse(inputs), expected, rtol=1e-5, atol=1e-6)


def test_apply_refuses_another_model():
    _, masks = pruned_model()
    with pytest.raises(ValueError, match=r"no parameter 2.weight: masks of another model\?"):
        masks.apply_(nn.Sequential(nn.Linear(20, 30)))
    other = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    before = other[0].weight.clone()
    with pytest.raises(ValueError, match=r"2.weight must have shape \(5, 30\), got \(4, 30\)"):
        masks.apply_(other)
    assert torch.equal(other[0].weight, before)


def test_deepcopy_and_tied_weights():
    model, masks = pruned_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with masks.attach(model, optimizer):
        twin, twin_masks = copy.deepcopy(model), copy.deepcopy(masks)
    assert torch.equal(twin[0].weight, model[0].weight)
    twin_masks["0.weight"].fill_(True)
    assert not masks["0.weight"].all()
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    Masks({"1.weight": torch.zeros(4, 4, dtype=torch.bool)}).apply_(tied)
    assert not tied[0].weight.any()


def test_file_round_trip(tmp_path):
    torch.manual_seed(0)
    masks = Masks({
        "a.weight": torch.rand(33, 7, 3, 3) < 0.1,
        "layout": (torch.rand(4, 5, 2, 2) < 0.5).contiguous(memory_format=torch.channels_last),
        "empty": torch.empty(0, 3, dtype=torch.bool),
        "scalar": torch.tensor(True),
    })  # fmt: skip
    path = tmp_path / "masks.safetensors"
    masks.save(path)
    loaded = Masks.load(path)
    assert list(loaded) == list(masks)
    for name in masks:
        assert torch.equal(loaded[name], masks[name])
    assert [p.name for p in tmp_path.iterdir()] == ["masks.safetensors"]
    masks.save(path)  # over an old file


def test_file_has_one_bit_an_entry(tmp_path):
    path = tmp_path / "masks.safetensors"
    Masks({"w": torch.ones(1000, 1000, dtype=torch.bool)}).save(path)
    assert path.stat().st_size < 1_000_000 / 8 + 1000


@pytest.mark.parametrize("damage", ("truncated", "empty", "text", "header", "other tensors", "wrong bits"))
def test_damaged_files(tmp_path, damage):
    path = tmp_path / "masks.safetensors"
    Masks({"w": torch.ones(100, 100, dtype=torch.bool)}).save(path)
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("these are not masks")
    elif damage == "header":
        path.write_bytes(b"\xff" * 8 + content[8:])
    elif damage == "wrong bits":
        path.write_bytes(content.replace(b"[100, 100]", b"[100, 999]"))
    else:
        from safetensors.torch import save_file

        save_file({"w": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"Masks.load: .*masks.safetensors is not a readable masks file"):
        Masks.load(path)


def test_missing_file_and_unwritable_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        Masks.load(tmp_path / "nothing.safetensors")
    with pytest.raises(OSError):
        Masks({"w": torch.ones(3, dtype=torch.bool)}).save(tmp_path / "no such folder" / "m.safetensors")


def test_a_crash_while_saving_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "masks.safetensors"
    Masks({"w": torch.ones(8, dtype=torch.bool)}).save(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        Masks({"w": torch.zeros(8, dtype=torch.bool)}).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_state_dict_round_trip():
    _, masks = pruned_model()
    other = Masks({name: torch.ones_like(mask) for name, mask in masks.items()})
    other.load_state_dict(masks.state_dict())
    assert torch.equal(other["0.weight"], masks["0.weight"])
    assert other["0.weight"] is not masks["0.weight"]
    with pytest.raises(ValueError, match="there is no mask for 2.weight"):
        other.load_state_dict({"0.weight": masks["0.weight"]})
    with pytest.raises(ValueError, match="a mask for x, which is not pruned"):
        other.load_state_dict({**masks.state_dict(), "x": masks["0.weight"]})


def test_numbers_and_text():
    masks = Masks({"w": torch.tensor([[True, False], [False, False]]), "v": torch.ones(4, dtype=torch.bool)})
    assert masks.sparsity() == 3 / 8
    assert "2x2" in masks.summary() and "0.2500" in masks.summary()
    assert repr(masks) == "Masks(2 tensors, sparsity 0.3750)"
    assert Masks({}).sparsity() == 0.0
    assert masks.to("cpu")["w"] is masks["w"]
    with pytest.raises(TypeError, match="w must be a bool tensor, got torch.float32"):
        Masks({"w": torch.ones(2)})
