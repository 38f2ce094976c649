"""drive.sparse.convert: whole models, and chains of layers in them, that behave as the dense ones."""

from __future__ import annotations

import copy
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import drive
from drive.sparse import SparseConv2d, SparseLinear, convert, measure, report
from drive.sparse.chains import link, trace
from drive.sparse.convert import CHAINS, PLAN, _chained, _replaced
from drive.sparse.laid_out import KINDS as LAID_OUT

convert_module = import_module("drive.sparse.convert")  # drive.sparse.convert is the function

TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}  # everything here is float64


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(outputs, momentum=None)
        self.short = None
        if stride > 1:
            self.short = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs, affine=False)
            )

    def forward(self, x: Tensor) -> Tensor:
        same = x if self.short is None else self.short(x)
        x = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        x += same
        return F.relu(x)


class Small(nn.Module):
    """Everything that chains know, and what ends them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding="same")
        self.pool = nn.MaxPool2d(2)
        self.blocks = nn.Sequential(Residual(8, 8), Residual(8, 12, 2))
        self.odd = nn.Conv2d(12, 12, 3, padding=1, groups=4)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.pool(self.stem(x).relu()))
        x = self.odd(x).sigmoid() + x
        return self.fc(torch.flatten(self.mean(x), 1))


class Untraceable(Small):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return super().forward(x)


def pruned(model: nn.Module, density: float = 0.3) -> tuple[nn.Module, drive.Masks]:
    torch.manual_seed(0)
    model = model.double()
    masks = drive.Masks({
        f"{name}.weight": torch.rand(layer.weight.shape) < density
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    })  # fmt: skip
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return model, masks.apply_(model)


def all_sparse(model: nn.Module, masks: drive.Masks) -> dict[str, nn.Module]:
    kinds = {nn.Conv2d: SparseConv2d, nn.Linear: SparseLinear}
    return {
        name: kinds[type(layer)].from_dense(layer, masks[f"{name}.weight"])
        for name, layer in model.named_modules()
        if type(layer) in kinds
    }


def chained(model: nn.Module, masks: drive.Masks) -> nn.Module:
    found = _chained(model, all_sparse(model, masks))
    assert found is not None
    return found


def assert_same_training(ours: nn.Module, dense: nn.Module, masks: drive.Masks, steps: int = 3) -> None:
    """The same losses, weights, statistics and optimizer state, step by step."""
    optimizers = [
        torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3) for m in (ours, dense)
    ]
    handles = [masks.attach(m, o) for m, o in zip((ours, dense), optimizers, strict=True)]
    for seed in range(steps):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(19, 3, 16, 16, generator=generator, dtype=torch.float64)
        losses = []
        for model, optimizer in zip((ours, dense), optimizers, strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), torch.arange(19) % 5)
            loss.backward()
            optimizer.step()
            losses.append(loss)
        torch.testing.assert_close(*losses, **TOLERANCE)
    for handle in handles:
        handle.remove()
    for (name, mine), (other_name, other) in zip(
        ours.state_dict().items(), dense.state_dict().items(), strict=True
    ):
        assert name == other_name
        torch.testing.assert_close(mine, other, **TOLERANCE)


@pytest.mark.parametrize("batch", (1, 16, 21))
def test_chains_in_evaluation(batch: int):
    model, masks = pruned(Small())
    model.eval()
    ours, x = chained(model, masks), torch.randn(batch, 3, 16, 16, dtype=torch.float64)
    expected = model(x)
    torch.testing.assert_close(ours(x), expected, **TOLERANCE)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), expected, **TOLERANCE)
        torch.testing.assert_close(ours(x), expected, **TOLERANCE)  # with what the first call kept


def test_chains_in_training():
    model, masks = pruned(Small())
    dense = copy.deepcopy(model)
    assert_same_training(chained(model, masks), dense, masks)


def test_chains_know_these_layers():
    model, masks = pruned(Small())
    sparse = all_sparse(model, masks)
    for name, layer in sparse.items():
        model.set_submodule(name, layer)
    link(graph := trace(model), {name for name, layer in sparse.items() if isinstance(layer, SparseConv2d)})
    targets = [getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes]
    assert targets.count("_convolved") == 7
    assert targets.count("_to_blocks") == 2  # the input, and behind the sigmoid
    assert not [target for target in targets if "bn" in target or "relu" in target]


def test_shares_parameters_and_keys():
    model, masks = pruned(Small())
    ours = chained(model, masks)
    for copied in (ours, copy.deepcopy(ours)):
        assert list(copied.state_dict()) == list(model.state_dict())
    for mine, theirs in zip(ours.parameters(), model.parameters(), strict=True):
        assert mine is theirs
    restored = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    ours.load_state_dict(restored)
    assert not model.fc.weight.any()


def test_kept_values_follow_the_weights():
    model, masks = pruned(Small())
    model.eval()
    ours, x = chained(model, masks), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        ours(x)
        for tensor in (
            model.blocks[0].conv1.weight,
            model.blocks[0].bn1.bias,
            model.blocks[1].short[1].running_mean,
        ):
            tensor.mul_(0.5).add_(tensor.roll(1, 0) * 0.1)
            masks.apply_(model)
            torch.testing.assert_close(ours(x), model(x), **TOLERANCE)


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("model", (Small, Untraceable))
def test_convert(model: type[nn.Module], training: bool, monkeypatch: pytest.MonkeyPatch):
    """Layers this small may win either way: sparse ones are made to, the whole model is measured."""
    monkeypatch.setattr(measure, "layer_times", lambda *_: {"dense": 2.0, "sparse": 1.0})
    dense, masks = pruned(model())
    dense.train(training)
    before = copy.deepcopy(dense.state_dict())
    x = torch.randn(19, 3, 16, 16, dtype=torch.float64)
    ours = convert(dense, masks, x)
    assert ours.training == training
    for name, value in dense.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} changed"
    assert all(p.grad is None for p in dense.parameters())
    found = report(ours)
    assert [choice.name for choice in found.choices] == [n.removesuffix(".weight") for n in masks]
    assert {"dense", "dense channels_last", "layer by layer"} <= found.whole.keys()
    assert ("sparse chains" in found.whole) == (model is Small)
    assert "whole model" in str(found)
    assert_same_training(copy.deepcopy(ours).train(), copy.deepcopy(dense).train(), masks)


@pytest.mark.parametrize("training", (False, True))
def test_convert_by_the_cost_model(training: bool):
    def chosen(density: float, images: int, side: int) -> str:
        layers = nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)
        model, masks = pruned(nn.Sequential(*layers).train(training), density)
        x = torch.zeros(images, 3, side, side, dtype=torch.float64)
        first, second = (report(convert(model, masks, x, deterministic=True)) for _ in range(2))
        assert first == second
        return first.chosen

    assert chosen(0.02, 32, 16) == "sparse chains"
    assert chosen(0.9, 32, 16) == "dense"
    assert chosen(0.02, 1, 1) == "dense"  # a call costs more than it saves


def test_convert_leaves_what_it_cannot_compute():
    model, masks = pruned(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU()))
    ours = convert(model, masks, torch.randn(2, 3, 8, 8, dtype=torch.float64))
    (choice,) = report(ours).choices
    assert (choice.chosen, choice.why) == ("dense", "padding_mode 'reflect'")


@pytest.mark.parametrize("name", LAID_OUT)
def test_convert_takes_a_laid_out_linear(name: str, monkeypatch: pytest.MonkeyPatch):
    """In inference, and beside a plan too; in training there is no such candidate."""
    seconds = dict.fromkeys(LAID_OUT, 1.6) | {"dense": 2.0, "sparse": 1.5, name: 1.0}
    monkeypatch.setattr(
        measure, "layer_times", lambda layer, found, *_: {n: seconds[n] for n in ("dense", *found)}
    )
    monkeypatch.setattr(
        convert_module, "model_times", lambda ways, *_: {w: 0.5 if w in (CHAINS, PLAN) else 1.0 for w in ways}
    )
    model, masks = pruned(Small())
    model, x = model.float(), torch.randn(19, 3, 16, 16)
    if why := LAID_OUT[name].reason_against(model.fc):
        pytest.skip(why)
    for training in (False, True):
        ours = convert(model.train(training), masks, x)
        assert report(ours).chosen == (CHAINS if training else PLAN)
        assert isinstance(ours.fc, SparseLinear if training else LAID_OUT[name])
        assert report(ours).choices[-1].chosen == ("sparse" if training else name)
        with torch.no_grad():
            expected = copy.deepcopy(model)(x)
            torch.testing.assert_close(copy.deepcopy(ours)(x), expected, rtol=1e-4, atol=1e-4)


def test_refuses():
    model, masks = pruned(Small())
    with pytest.raises(ValueError, match="convert: the model has no parameter"):
        convert(nn.Linear(3, 4), masks, torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"SparseLinear: mask must have shape \(4, 3\), got \(3, 4\)"):
        SparseLinear.from_dense(nn.Linear(3, 4), torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="report: model must come from drive.sparse.convert"):
        report(model)


def test_compiles():
    model, masks = pruned(Small())
    model.eval()
    ours, x = chained(model, masks), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), **TOLERANCE)
    compiled(x).sum().backward()
    assert model.stem.weight.grad is not None


@pytest.mark.parametrize("training", (False, True))
def test_autocast_computes_sparse_layers_in_float32(training: bool):
    model, masks = pruned(Small())
    model = model.float().train(training)
    for ours in (chained(model, masks), _replaced(model, all_sparse(model, masks))):
        x = torch.randn(17, 3, 16, 16)
        expected = copy.deepcopy(model)(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = copy.deepcopy(ours)(x)
        torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)  # the rest is bfloat16
        found.sum().backward()


def test_16_bit_models_run_layer_by_layer():
    model, masks = pruned(Small(), 0.05)
    model = model.bfloat16().eval()
    ours = _replaced(model, all_sparse(model, masks))
    x = torch.randn(17, 3, 16, 16, dtype=torch.bfloat16)
    torch.testing.assert_close(ours(x), model(x), rtol=0.05, atol=0.05)
    assert _chained(model, all_sparse(model, masks)) is None
    assert convert(model, masks, x)(x).dtype == torch.bfloat16
