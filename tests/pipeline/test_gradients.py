"""check_gradients finds dead tensors, and leaves the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from drive.pipeline import check_gradients, hadamard_init_

loss_fn = nn.functional.cross_entropy


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def bordered() -> tuple[Tensor, Tensor]:
    images = nn.functional.pad(torch.rand(32, 1, 20, 20), [4] * 4)
    return images, torch.arange(32) % 10


def test_an_mlp_that_starts_with_an_identity_is_dead_on_black_borders():
    torch.manual_seed(0)
    model, batch = mlp(), bordered()
    hadamard_init_(model, "identity")
    with pytest.raises(
        ValueError, match="^check_gradients: 1.weight, 3.weight and 5.weight get no gradient: on this batch"
    ):
        check_gradients(model, batch, loss_fn)
    for first in (None, "hadamard"):
        hadamard_init_(model, first)
        assert check_gradients(model, batch, loss_fn) is None


def test_messages():
    layers = [nn.Linear(4, 4) for _ in range(8)]
    model, batch = nn.Sequential(*layers), (torch.rand(2, 4), torch.tensor([0, 1]))
    nn.init.zeros_(layers[-1].weight)
    with pytest.raises(
        ValueError, match="0.weight, 1.weight, 2.weight, 3.weight, 4.weight and 2 more get no"
    ):
        check_gradients(model, batch, loss_fn)
    with pytest.raises(ValueError, match="gradients: 0.weight and 1.weight get no gradient"):
        check_gradients(model, batch, loss_fn, include=["0.weight", "1.weight", "7.weight"])
    with pytest.raises(ValueError, match="gradients: 6.weight gets no gradient"):
        check_gradients(model, batch, loss_fn, exclude=[f"{i}.weight" for i in range(6)])
    check_gradients(model, batch, loss_fn, include="7.weight")


def test_forms_of_batches():
    model, (inputs, targets) = nn.Linear(4, 4), (torch.rand(2, 4), torch.tensor([0, 1]))
    check_gradients(
        model,
        {"x": inputs, "y": targets},
        compute_loss=lambda model, batch: loss_fn(model(batch["x"]), batch["y"]),
    )
    with pytest.raises(TypeError, match="^check_gradients: a batch must be"):
        check_gradients(model, (inputs, targets))
    with pytest.raises(TypeError, match="^check_gradients: loss_fn must be callable"):
        check_gradients(model, (inputs, targets), "cross_entropy")


def test_without_a_part_in_the_loss():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    batch = torch.rand(2, 4), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="1.weight has no gradient: the loss does not depend on it"):
        check_gradients(model, batch, compute_loss=lambda model, batch: loss_fn(model[0](batch[0]), batch[1]))


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_all_is_afterwards_as_before(dead: bool, training: bool):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4)).train(training)
    model[0].eval()
    if dead:
        nn.init.zeros_(model[3].weight)
    model[0].weight.grad = torch.ones(8, 4)
    model[0].bias.requires_grad_(False)
    before, grad = copy.deepcopy(model.state_dict()), model[0].weight.grad
    batch = torch.rand(4, 4), torch.arange(4)
    rng = torch.get_rng_state()
    with torch.no_grad():  # an outer one does not matter
        if dead:
            with pytest.raises(ValueError, match="0.weight gets no gradient"):
                check_gradients(model, batch, loss_fn)
        else:
            check_gradients(model, batch, loss_fn)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model[0].weight.grad is grad and torch.equal(grad, torch.ones(8, 4))
    assert all(p.grad is None for p in model.parameters() if p is not model[0].weight)
    assert [module.training for module in model] == [False, training, training, training]
    assert not model[0].bias.requires_grad
