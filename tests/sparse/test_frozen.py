"""drive.sparse.freeze: networks nobody here wrote, other sizes, models that are no graph, wrong input."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import drive
from drive.sparse import Frozen, PartlyFrozen, freeze
from drive.sparse.frozen import lower
from drive.sparse.frozen.reference import run_reference

TOLERANCE = 1e-5  # of the largest output, float32


def pruned(model: nn.Module, density: float = 0.2) -> tuple[nn.Module, drive.Masks]:
    """In evaluation mode, scaled for values that neither vanish nor explode, with statistics of its own."""
    generator = torch.Generator().manual_seed(0)
    masks = drive.Masks({
        f"{name}.weight": torch.rand(layer.weight.shape, generator=generator) < density
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    })  # fmt: skip
    masks.apply_(model)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.weight.div_(density**0.5)
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.1, generator=generator)
                layer.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval(), masks


def leaves(result: object) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]


@torch.no_grad()
def error(plan: Frozen | PartlyFrozen, model: nn.Module, *inputs: object) -> float:
    """The largest difference, relative to the largest output."""
    pairs = zip(leaves(plan(*inputs)), leaves(model(*inputs)), strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in pairs)


class Block(nn.Module):
    """A residual block, its sum written in place; with a gate."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding="same")
        self.gate = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.relu_(self.norm(self.first(x))))
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        y += x
        return nn.functional.silu(y)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2)
        self.blocks = nn.Sequential(Block(16), Block(16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.blocks(self.stem(x))
        return {"features": features, "logits": self.fc(features.mean((2, 3)).view(x.shape[0], -1))}


FAST = ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1")
SLOW = ("alexnet", "densenet121", "efficientnet_b0", "googlenet", "mnasnet0_5", "regnet_y_400mf", "vgg11_bn")


@pytest.mark.parametrize("name", (*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)))
def test_torchvision(name: str):
    models = pytest.importorskip("torchvision.models")
    more = {"init_weights": True} if name == "googlenet" else {}
    model, masks = pruned(getattr(models, name)(weights=None, num_classes=10, **more))
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    plan = freeze(model, masks, x)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert isinstance(plan, Frozen)
    assert error(plan, model, x) < TOLERANCE


@pytest.mark.parametrize(
    "name", ("seresnet18", pytest.param("tf_efficientnet_lite0", marks=pytest.mark.slow))
)
def test_timm(name: str):
    timm = pytest.importorskip("timm")
    model, masks = pruned(timm.create_model(name, num_classes=10))
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    plan = freeze(model, masks, x)
    assert error(plan, model, x) < TOLERANCE
    assert error(plan, model, x.expand(3, -1, -1, -1)) < TOLERANCE


def test_a_transformer_runs_by_its_linear_layers():
    model, masks = pruned(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True))
    x = torch.randn(2, 7, 32)
    plan = freeze(model, masks, x)
    assert error(plan, model, x) < TOLERANCE


def test_other_batches_and_sizes():
    model, masks = pruned(Small())
    plan = freeze(model, masks, torch.randn(1, 3, 32, 32))
    for shape in ((1, 3, 32, 32), (2, 3, 32, 32), (5, 3, 17, 40), (16, 3, 9, 9), (1, 3, 33, 31)):
        assert error(plan, model, torch.randn(shape)) < TOLERANCE
    assert error(plan, model, torch.randn(4, 3, 24, 24).to(memory_format=torch.channels_last)) < TOLERANCE
    assert error(plan, model, torch.randn(2, 32, 32, 3).permute(0, 3, 1, 2)[:, :, ::2]) < TOLERANCE


def test_results_have_no_gradients_and_any_mode_will_do():
    model, masks = pruned(Small())
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    plan = freeze(model, masks, x.detach())
    assert not plan(x)["logits"].requires_grad
    with torch.inference_mode():
        again = plan(x.detach().clone())
    assert torch.equal(plan(x)["logits"], again["logits"])


def test_threads_of_python_and_of_torch():
    model, masks = pruned(Small())
    x = torch.randn(4, 3, 24, 24)
    plan = freeze(model, masks, x)
    expected = plan(x)["logits"]
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(expected, found["logits"]) for found in pool.map(plan, [x] * 16))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert error(plan, model, x) < TOLERANCE
    finally:
        torch.set_num_threads(threads)


def test_what_is_pruned_does_not_matter_and_the_model_may_change():
    model, masks = pruned(Small())
    x = torch.randn(2, 3, 16, 16)
    expected = freeze(model, masks, x)(x)["logits"]
    with torch.no_grad():
        model.stem.weight[~masks["stem.weight"]] = float("nan")
    plan = freeze(model, masks, x)
    with torch.no_grad():
        model.stem.weight.zero_()
    assert torch.equal(plan(x)["logits"], expected)


@pytest.mark.parametrize("way", lower.WAYS)
def test_hardly_pruned_networks_go_the_fastest_way(way: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lower, "interleaved", lambda runs, **_: {name: float(name != way) for name in runs})
    model, masks = pruned(Small(), density=0.97)
    x = torch.randn(2, 3, 16, 16)
    plan = freeze(model, masks, x)
    (runner,) = plan._runners.values()
    assert runner.way == way
    assert bool(runner.in_lanes) == (way == lower.ENGINE)
    assert error(plan, model, x) < TOLERANCE


def test_where_nothing_is_compiled_pytorchs_layers_serve(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lower, "_compiled", lambda: False)
    model, masks = pruned(Small())
    x = torch.randn(2, 3, 16, 16)
    plan = freeze(model, masks, x)
    assert "in lanes (0 programs): nothing" in plan.report
    assert error(plan, model, x) < TOLERANCE


def test_shared_weights_and_several_inputs():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor, y: Tensor, turn: bool) -> tuple[Tensor, list[Tensor]]:
            z = self.conv(self.conv(x)) + self.conv(y)
            return z, [z.flip(3) if turn else z, x]

    model, masks = pruned(Twice())
    x, y = torch.randn(2, 4, 10, 10), torch.randn(2, 4, 10, 10)
    plan = freeze(model, masks, (x, y, True))
    assert error(plan, model, x, y, True) < TOLERANCE
    with pytest.raises(ValueError, match="turn must be True as in the example, got False"):
        plan(x, y, False)


def test_sizes_that_the_models_code_decides_by():
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.shape[2] % 2 == 0 else self.conv(x) * 2

    model, masks = pruned(Picky())
    plan = freeze(model, masks, torch.randn(2, 3, 16, 16))
    assert error(plan, model, torch.randn(2, 3, 16, 16)) < TOLERANCE
    with pytest.raises(ValueError, match="freeze: "):
        plan(torch.randn(2, 3, 17, 16))


def test_images_of_another_batch_inside():
    """A model may stack its inputs, or fold frames into the batch."""

    class Stacks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.second(torch.cat([y, y.flip(3), y * 2]))

    model, masks = pruned(Stacks())
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 12, 12)
        assert error(freeze(model, masks, x), model, x) < TOLERANCE


class Untraceable(Small):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = super().forward(x)
        if float(found["logits"].sum()) > 0:
            found["logits"] = found["logits"] * 2
        return found


def test_a_model_that_is_no_graph_is_frozen_by_parts():
    model, masks = pruned(Untraceable())
    plan = freeze(model, masks, torch.randn(2, 3, 16, 16))
    assert isinstance(plan, PartlyFrozen)
    for shape in ((2, 3, 16, 16), (3, 3, 20, 12)):
        assert error(plan, model, torch.randn(shape)) < TOLERANCE
    assert "called as it is: the model's own code" in plan.report
    assert "blocks:" in plan.report
    with pytest.raises(ValueError, match="freeze: model must be one graph to be saved"):
        plan.save("plan.safetensors")


class Counts(nn.Module):
    """Writes to a buffer, which a plan would forget."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x)


def test_what_a_plan_would_forget_stays_the_models_code():
    model, masks = pruned(Counts())
    plan = freeze(model, masks, torch.randn(2, 3, 8, 8))
    assert isinstance(plan, PartlyFrozen)
    assert "it writes to calls" in plan.report
    assert float(model.calls) == 0
    assert error(plan, model, torch.randn(3, 3, 9, 8)) < TOLERANCE


def test_sizes_that_values_decide():
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)[:, :, 0, 0].flatten()[x.flatten()[:8].gt(0).nonzero().squeeze(1)]

    model, masks = pruned(Picks())
    x = torch.ones(2, 3, 8, 8)
    assert error(freeze(model, masks, x), model, x) < TOLERANCE


def test_the_graph_alone_is_the_model():
    """Before anything is fused or lowered."""
    model, masks = pruned(Small())
    x = torch.randn(3, 3, 16, 16)
    plan = freeze(model, masks, x)
    with torch.no_grad():
        for found, expected in zip(run_reference(plan._graph, [x]), leaves(model(x)), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


def test_refuses():
    model, masks = pruned(Small())
    x = torch.randn(2, 3, 16, 16)
    plan = freeze(model, masks, x)
    for wrong, message in (
        (x.double(), "x must be float32 as in the example, got float64"),
        (x[0], "x must have sizes anyx3xanyxany, got 3x16x16"),
        (torch.randn(2, 4, 16, 16), "x must have sizes anyx3xanyxany, got 2x4x16x16"),
        (3, "x must be a tensor as in the example, got int"),
        (x.to("meta"), "x must be a dense tensor on the CPU, got torch.strided on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(wrong)
    with pytest.raises(ValueError, match=r"arguments must be as in the example \(1\), got 2"):
        plan(x, x)
    with pytest.raises(ValueError, match=r"freeze: model must be in evaluation mode \(model.eval\(\)\)"):
        freeze(copy.deepcopy(model).train(), masks, x)
    with pytest.raises(ValueError, match="freeze: parameters must be float32, got stem.weight of float64"):
        freeze(copy.deepcopy(model).double(), masks, x.double())
    with pytest.raises(ValueError, match="freeze: the model has no parameter"):
        freeze(nn.Linear(3, 4).eval(), masks, torch.randn(2, 3))
