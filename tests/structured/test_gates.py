"""Gate scores of CroP and EarlyCroP, against finite differences and gates that are there."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import drive
from drive._scoring.gradients import loss_gradients
from drive._scoring.loss import Loss
from drive.masks import Masks
from drive.methods.base import Problem
from drive.methods.second_order import gate_sensitivities
from drive.targets.outputs import rows_of
from drive.targets.targets import prunable


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 3, 2, bias=False)
        self.fc = nn.Linear(3 * 9, 5)

    def forward(self, x, gates=None):
        gates = gates or dict.fromkeys(("conv", "up", "fc"), 1.0)
        c = {name: g if isinstance(g, float) else g.view(1, -1, 1, 1) for name, g in gates.items()}
        y = torch.tanh(self.norm(self.conv(x) * c["conv"]))
        y = torch.tanh(self.up(y) * c["up"])
        fc = self.fc(y.flatten(1))
        return fc * (gates["fc"] if not isinstance(gates["fc"], float) else 1.0)


def problem(masks: bool) -> tuple[Problem, list]:
    torch.manual_seed(0)
    model = Net().double().eval()
    model.conv.bias.requires_grad_(False)  # a frozen one is multiplied by its gate, too
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.weight.uniform_(0.5, 1.5)
    batches = [(torch.randn(3, 2, 4, 4).double(), torch.randint(5, (3,))) for _ in range(2)]
    weights = prunable(model)
    held = None
    if masks:
        held = Masks.dense(model)
        held["conv.weight"][1, 0] = False
        held["fc.weight"][:, ::3] = False
        held.apply_(model)
    loss = Loss(F.cross_entropy)
    made = Problem(
        model, weights, iter(batches), loss, loss_gradients(model, weights, loss, None),
        train=lambda *_: None, accumulate=2, sparsity=0.5, iteration=1, iterations=1,
        masks=held,
    )  # fmt: skip
    return made, batches


@pytest.mark.parametrize("masks", [False, True])
def test_they_are_derivatives_of_the_gradient_flow_by_gates(masks):
    made, batches = problem(masks)
    found = gate_sensitivities("test", made, rows_of(made.model, made.weights), batches)
    model, weights = made.model, made.weights
    assert not model.conv.bias.requires_grad
    held = {name: (made.masks or {}).get(name, torch.ones_like(w)) for name, w in weights.items()}
    gates = {name: torch.ones(len(found[f"{name}.weight"])).double() for name in ("conv", "up", "fc")}

    def flow(gates, fixed):
        total = 0.0
        for x, y in batches:
            loss = F.cross_entropy(model(x, gates), y)
            grads = torch.autograd.grad(loss, list(weights.values()))
            for name, grad in zip(weights, grads, strict=True):
                total += (fixed[name] * grad * held[name]).sum() if fixed else 0
        return total

    fixed = {name: torch.zeros_like(w) for name, w in weights.items()}
    for x, y in batches:
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(weights.values()))
        for name, grad in zip(weights, grads, strict=True):
            fixed[name] += grad * held[name]
    step = 1e-5
    for name, gate in gates.items():
        for index in range(len(gate)):
            shifted = []
            for sign in (1, -1):
                moved = {other: values.clone() for other, values in gates.items()}
                moved[name][index] += sign * step
                shifted.append(float(flow(moved, fixed)))
            expected = (shifted[0] - shifted[1]) / (2 * step)
            assert float(found[f"{name}.weight"][index]) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("method", ["crop", "early_crop"])
def test_a_group_has_one_gate(method):
    """Of layers that are added up, the absolute value is of the sum of their gates' derivatives."""
    pytest.importorskip("torch_pruning")

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.c(torch.tanh(self.a(x) + self.b(x)))

    torch.manual_seed(0)
    model, data = Sum().double(), [(torch.randn(9, 5).double(), torch.arange(9) % 3)]
    weights, loss = prunable(model), Loss(F.cross_entropy)
    made = Problem(
        model, weights, iter(data), loss, loss_gradients(model, weights, loss, None), train=lambda *_: None,
        accumulate=1, sparsity=0.5, iteration=1, iterations=1,
    )  # fmt: skip
    found = gate_sensitivities("test", made, rows_of(model, weights), data)
    best = (found["a.weight"] + found["b.weight"]).abs().argsort(descending=True)[:3]
    chosen = drive.methods.get(method)
    masks = drive.prune(
        model, data, F.cross_entropy, method=chosen, structure="channels", sparsity=0.5, accumulate=1,
        train=lambda *_: None, progress=False,
    )  # fmt: skip
    assert set(masks["a.weight"].any(1).nonzero().flatten().tolist()) == set(best.tolist())
