"""drive.reference.literal: the paper's equations, and that the fused masks are theirs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from drive import Masks, fused_drive_prune
from drive.reference import literal, literal_scores

LOSS = nn.functional.cross_entropy

# How far apart, at most, are scores that the fused step takes for equal: it ranks x = |theta * G| rounded to
# float32, and two x of the same rounding r are less than 2^-23 apart; the score is x * r. Products of 16-bit
# numbers are exact in float32: what is equal there, is.
TOLERANCE = {torch.float32: 2**-23, torch.bfloat16: 0.0, torch.float16: 0.0}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 40), nn.Tanh(), nn.Linear(40, 4))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 6, 3, groups=2), nn.BatchNorm2d(6),
        nn.Tanh(), nn.Flatten(), nn.Linear(96, 4),
    )  # fmt: skip


def tied() -> nn.Module:
    first, second = nn.Linear(192, 192), nn.Linear(192, 192)
    second.weight = first.weight
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), second, nn.Tanh(), nn.Linear(192, 4))


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(16, 3, 8, 8, dtype=dtype), torch.arange(16) % 4


def backward(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    """The gradients of a batch, by the model as it is: BatchNorm's statistics are for `literal` to find."""
    twin = copy.deepcopy(model)
    LOSS(twin(inputs), targets).backward()
    for parameter, of_twin in zip(model.parameters(), twin.parameters(), strict=True):
        parameter.grad = of_twin.grad


def flat(tensors: dict[str, Tensor] | Masks) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def product(*factors: dict[str, Tensor]) -> Tensor:
    return torch.stack([flat(factor) for factor in factors]).prod(0).abs()


def largest(scores: Tensor, keep: int) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, scores.topk(keep).indices, True)


def test_equations_on_numbers():
    """theta = (1, -2, 3), L = theta * m . x, x = (2, 3, 1): S = (theta x)^2 = (4, 36, 9), their sum 49."""
    model = nn.Linear(3, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, -2.0, 3.0]])
    arguments = model, torch.tensor([[2.0, 3.0, 1.0]]), None, lambda output, _: output.sum()
    z = literal_scores(*arguments, Masks.dense(model))["weight"]
    assert torch.equal(z, torch.tensor([[4.0, 36.0, 9.0]], dtype=torch.float64) / 49)
    assert literal(*arguments, sparsity=1 / 3)["weight"].tolist() == [[False, True, True]]
    masks = Masks({"weight": torch.tensor([[True, False, True]])})  # the gradient by the weight is m * x
    again = literal_scores(*arguments, masks)["weight"]
    assert torch.equal(again, torch.tensor([[4.0, 0.0, 9.0]], dtype=torch.float64) / 13)
    for fewer in (1 / 3, 0):
        kept = literal(*arguments, sparsity=fewer, masks=masks)["weight"]
        assert torch.equal(kept, masks["weight"]), "what is pruned never comes back"


@pytest.mark.parametrize("build", (mlp, cnn, tied))
@pytest.mark.parametrize("seed", range(3))
def test_fused_masks_are_the_papers(build, seed):
    """In float64, entry for entry, and Eq. 7's threshold; of a first step, and of two with masks before."""
    torch.manual_seed(seed)
    model = build().double()
    masks = Masks.dense(model)
    for sparsity in (0.5, 0.8, 0.97):
        inputs, targets = batch(torch.float64)
        backward(model, inputs, targets)
        z = literal_scores(model, inputs, targets, LOSS, masks)
        expected = literal(model, inputs, targets, LOSS, sparsity=sparsity, masks=masks)
        result = fused_drive_prune(model, sparsity=sparsity, masks=masks)
        masks = result.masks
        assert list(masks) == list(expected)
        assert all(torch.equal(masks[name], expected[name]) for name in masks)
        assert result.threshold == pytest.approx(float(flat(z)[flat(masks)].min()), rel=1e-12)


@pytest.mark.parametrize("build", (mlp, cnn, tied))
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_where_rounding_decides(build, dtype):
    torch.manual_seed(0)
    model = build().to(dtype)
    masks = Masks.dense(model)
    for sparsity in (0.5, 0.9):
        inputs, targets = batch(dtype)
        backward(model, inputs, targets)
        z = flat(literal_scores(model, inputs, targets, LOSS, masks))
        expected = flat(literal(model, inputs, targets, LOSS, sparsity=sparsity, masks=masks))
        masks = fused_drive_prune(model, sparsity=sparsity, masks=masks).masks
        check(flat(masks), expected, z, sparsity, dtype)


def check(found: Tensor, expected: Tensor, z: Tensor, sparsity: float, dtype: torch.dtype) -> int:
    """The counts are exact; what differs, by number, has a score at the threshold."""
    assert found.sum() == expected.sum() == found.numel() - round(sparsity * found.numel())
    threshold, differ = z[expected].min(), found != expected
    assert ((z[differ] - threshold).abs() <= TOLERANCE[dtype] * threshold).all()
    return int(differ.sum())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_where_rounding_decides_many_times(dtype):
    """theta * G takes about a thousand values in float32, next to 1; a few in 16 bits."""
    torch.manual_seed(0)
    inputs = torch.rand(1, 100_000).add_(1).to(dtype)
    model = nn.Linear(100_000, 1, bias=False, dtype=dtype)
    model.weight.data = ((1 + torch.rand(1, 100_000) * 2**-13) / inputs).to(dtype)

    def loss_fn(output: Tensor, _: None) -> Tensor:
        return output.sum()

    z = flat(literal_scores(model, inputs, None, loss_fn, Masks.dense(model)))
    expected = flat(literal(model, inputs, None, loss_fn, sparsity=0.5))
    loss_fn(model(inputs), None).backward()
    found = flat(fused_drive_prune(model, sparsity=0.5).masks)
    assert check(found, expected, z, 0.5, dtype) > 0


@pytest.mark.parametrize("build", (mlp, cnn, tied))
def test_every_factor_counts(build):
    """Without theta or dL/dtheta the masks are others.

    Without dL/dm = theta * G they cannot be, as |theta * G| ranks as its square (docs/method.md); z is.
    """
    torch.manual_seed(0)
    model = build().double()
    inputs, targets = batch(torch.float64)
    backward(model, inputs, targets)
    z = literal_scores(model, inputs, targets, LOSS, Masks.dense(model))
    expected = flat(literal(model, inputs, targets, LOSS, sparsity=0.8))
    theta = {name: model.get_parameter(name).detach() for name in z}
    to_theta = {name: model.get_parameter(name).grad for name in z}
    to_m = {name: theta[name] * to_theta[name] for name in z}
    keep, few = int(expected.sum()), len(expected) // 100

    scores, without_to_m = product(theta, to_m, to_theta), product(theta, to_theta)
    assert torch.equal(expected, largest(scores, keep))
    assert (expected != largest(product(to_m, to_theta), keep)).sum() > few
    assert (expected != largest(product(theta, to_m), keep)).sum() > few
    assert torch.equal(expected, largest(without_to_m, keep))
    torch.testing.assert_close(flat(z), scores / scores.sum(), rtol=1e-12, atol=0)
    assert not torch.allclose(flat(z), without_to_m / without_to_m.sum())


def test_nothing_is_changed():
    torch.manual_seed(0)
    model, (inputs, targets) = cnn(), batch(torch.float32)
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    masks = Masks.dense(model)
    literal(model, inputs, targets, LOSS, sparsity=0.5, masks=masks)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model[0].weight.requires_grad and masks.sparsity() == 0


def test_bad_input():
    model, (inputs, targets) = mlp(), batch(torch.float32)
    with pytest.raises(ValueError, match=r"literal: sparsity must be in \[0, 1\), got 1"):
        literal(model, inputs, targets, LOSS, sparsity=1)
    with pytest.raises(
        ValueError, match="literal: masks must be those of this model: there is no mask for 1.wei"
    ):
        literal(model, inputs, targets, LOSS, sparsity=0.5, masks=Masks({}))
    for bad, got in ((0, "0.0"), (torch.nan, "nan")):
        with pytest.raises(ValueError, match=f"scores must be finite and not all 0, got a sum of {got}"):
            literal(model, inputs, targets, lambda *given, by=bad: LOSS(*given) * by, sparsity=0.5)
