"""What the survivors cost, as summaries say it."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from torch import nn

import drive
from drive import Masks, fused_drive_prune
from drive.layers.record import Weight, output_positions


class Notes(nn.Module):
    """Draws random numbers, counts its calls, keeps its mode: all that a pass may change."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.norm = nn.BatchNorm2d(8)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, images: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled()
        self.calls += 1
        hidden = self.norm(self.conv(images)) + torch.rand(())
        return self.head(scale * hidden.mean((2, 3)))


IMAGES = torch.zeros(5, 3, 10, 10)


def halved(model: nn.Module) -> Masks:
    masks = Masks.dense(model)
    masks["conv.weight"][4:] = False
    return masks


@pytest.mark.parametrize(
    "inputs", (IMAGES, (IMAGES, 2.0), {"images": IMAGES, "scale": 2.0}, UserDict(images=IMAGES))
)
def test_multiply_adds_of_masks(inputs: object):
    model = Notes()
    text = halved(model).summary(model, inputs)
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()}
    assert rows["tensor"][-1] == "multiply-adds"
    assert rows["conv.weight"] == ["8x3x3x3", "108", "0.5000", "6,912"]  # on 8 x 8 positions
    assert rows["head.weight"] == ["4x8", "32", "1.0000", "32"]
    assert text.splitlines()[-1] == "multiply-adds left 6,944 of 13,856: 50.12%"


def test_without_inputs_nothing_is_said_of_them():
    model = Notes()
    masks = halved(model)
    assert "multiply-adds" not in masks.summary()
    assert masks.summary().splitlines()[1:-1] == [
        line.rpartition("  ")[0].rstrip() for line in masks.summary(model, IMAGES).splitlines()[1:-2]
    ]


@pytest.mark.parametrize("training", (True, False))
def test_the_model_and_the_rng_are_left_alone(training: bool):
    model = Notes().train(training)
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    halved(model).summary(model, IMAGES)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.training, model.norm.training, model.conv.training) == (training, False, training)
    assert torch.equal(torch.get_rng_state(), state) and model.conv.weight.grad is None
    with pytest.raises(RuntimeError):
        halved(model).summary(model, IMAGES[:, :2])
    assert model.training is training and not model.conv._forward_hooks
    assert torch.equal(torch.get_rng_state(), state) and not model.calls


def test_layer_types_of_ones_own():
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv2d(images, self.kernel)

    layers = {Mine: {"kernel": Weight(uses=output_positions)}}
    model = nn.Sequential(Mine())
    assert "of 6,912: " in Masks.dense(model, layers=layers).summary(model, IMAGES, layers)


def test_what_does_not_fit_is_refused():
    model = Notes()
    masks = halved(model)
    with pytest.raises(
        ValueError, match=r"Masks.summary: model and inputs must be given together, got no in"
    ):
        masks.summary(model)
    with pytest.raises(
        ValueError, match=r"Masks.summary: model and inputs must be given together, got no mo"
    ):
        masks.summary(inputs=IMAGES)
    with pytest.raises(
        ValueError, match=r"Masks.summary: the model has no parameter conv.weight: masks of an"
    ):
        masks.summary(nn.Linear(3, 3), IMAGES)


def test_empty_masks():
    model = nn.Sequential(nn.ReLU())
    assert Masks({}).summary(model, IMAGES).endswith("multiply-adds left 0 of 0: 0.00%")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4))


def test_result_of_a_step_to_a_budget():
    model = network()
    model(torch.randn(4, 3, 10, 10)).square().mean().backward()
    costs = {"0.weight": 70, "3.weight": 2}
    result = fused_drive_prune(model, costs=costs, max_cost=5000)
    spent = sum(costs[count.name] * count.kept for count in result.per_tensor)
    dense = 216 * 70 + 2048 * 2
    assert result.cost_left == spent / dense and 5000 - 70 < spent <= 5000
    assert f"\ncost left {spent:,} of {dense:,}: {spent / dense:.2%}\nkept " in result.summary()
    assert result.summary().splitlines()[0].endswith(f"  {'cost':>18}")
    further = fused_drive_prune(model, sparsity=0.9, masks=result.masks)
    assert further.cost_left is None and "cost" not in further.summary()


def test_results_of_the_loop():
    results: list[drive.PruneResult] = []
    model = network()
    batches = [(torch.randn(4, 3, 10, 10), torch.randint(4, (4,)))]
    options = {"iterations": 2, "progress": False, "on_step": results.append}
    for method in ("drive", "grasp"):  # whose scores have a sign
        masks = drive.prune(
            network(), batches, nn.functional.cross_entropy, method=method, macs=0.25, **options
        )
        assert 0.24 < results[-1].cost_left <= 0.25 < results[-2].cost_left
        of_masks = masks.summary(model, batches[0][0]).splitlines()
        assert results[-1].summary().splitlines()[: len(of_masks)] == of_masks
