"""What methods rank by, against independent computations in float64 on tiny networks."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import drive
from drive import Masks, methods
from drive.rounds import ordered

LOSS = nn.functional.cross_entropy


def tiny(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batches(count: int = 1, size: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 5, generator=generator, dtype=torch.float64),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def scores_of(
    method, model: nn.Module, data, masks: Masks | None = None, **options
) -> dict[str, torch.Tensor]:
    """The scores that the first iteration ranks by."""
    found: dict[str, torch.Tensor] = {}

    class Watched(type(method)):
        def rank(self, problem):
            ranking = method.rank(problem)
            for name, weight in problem.weights.items():
                if ranking.scores is not None:
                    score = ranking.scores[name]
                else:
                    score = weight.detach().clone()
                    for given in (ranking.gradients, ranking.mask_gradients):
                        score = score if given is None else score * given[name]
                score = score if ranking.signed else score.abs()
                found[name] = (score**ranking.power).detach().clone()
            return ranking

    watched = object.__new__(Watched)
    watched.__dict__.update(method.__dict__)
    drive.prune(
        copy.deepcopy(model), data, LOSS, method=watched, sparsity=0.5, iterations=1, schedule="one_shot",
        masks=masks, progress=False, **options,
    )  # fmt: skip
    return found


def loss_of(model: nn.Module, data, scale: dict[str, torch.Tensor]) -> float:
    """The loss when the weights are multiplied by the mask `scale`."""
    weights = {name: w * scale[name] if name in scale else w for name, w in model.named_parameters()}
    inputs, targets = data[0]
    return LOSS(torch.func.functional_call(model, weights, (inputs,)), targets).item()


@pytest.mark.parametrize(("method", "power"), ((methods.Snip(), 1), (methods.Drive(), 2)))
def test_first_order_scores_are_finite_differences_in_the_mask(method, power: int):
    """SNIP's dL/dm and DRIVE's its square, each weight's mask moved from 1 by 1e-5 (error 1e-10)."""
    model, data = tiny(), batches()
    with torch.no_grad():
        for name, score in scores_of(method, model, data).items():
            one = torch.ones_like(score)
            for index in range(score.numel()):
                step = torch.zeros(score.numel(), dtype=torch.float64).index_fill_(
                    0, torch.tensor(index), 1e-5
                )
                up = loss_of(model, data, {name: one + step.view_as(one)})
                down = loss_of(model, data, {name: one - step.view_as(one)})
                slope = abs(up - down) / 2e-5
                assert float(score.flatten()[index]) == pytest.approx(slope**power, rel=1e-6, abs=1e-9)


def test_snip_predicts_what_a_removed_weight_costs():
    """To first order: for weights shrunk to a thousandth the loss changes by the score, to 1 %."""
    model, data = tiny(), batches()
    with torch.no_grad():
        for layer in (model[0], model[2], model[4]):
            layer.weight.mul_(1e-3)
    base = loss_of(model, data, {})
    for name, score in scores_of(methods.Snip(), model, data).items():
        for index in score.flatten().topk(5).indices:
            mask = torch.ones_like(score).flatten().index_fill_(0, index, 0).view_as(score)
            change = abs(loss_of(model, data, {name: mask}) - base)
            assert change == pytest.approx(float(score.flatten()[index]), rel=1e-2)


def hessian_times_gradient(model: nn.Module, data, temperature: float, masks=None) -> dict[str, torch.Tensor]:
    """From the whole Hessian."""
    names = [name for name, w in model.named_parameters() if w.dim() > 1]
    shapes = [model.get_parameter(name).shape for name in names]
    sizes = [shape.numel() for shape in shapes]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = zip(names, flat.split(sizes), shapes, strict=True)
        weights = {name: part.view(shape) for name, part, shape in parts}
        outputs = [torch.func.functional_call(model, weights, (x,)) / temperature for x, _ in data]
        return sum(LOSS(out, y) for out, (_, y) in zip(outputs, data, strict=True))

    flat = torch.cat([model.get_parameter(name).detach().flatten() for name in names])
    alive = torch.cat([masks[n].flatten() for n in names]) if masks else torch.ones_like(flat)
    gradient = torch.autograd.functional.jacobian(loss, flat) * alive
    product = torch.autograd.functional.hessian(loss, flat) @ gradient
    return {n: p.view(s) for n, p, s in zip(names, product.split(sizes), shapes, strict=True)}


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize(("method", "temperature"), ((methods.Grasp(), 200.0), (methods.Crop(), 1.0)))
def test_second_order_scores_are_those_of_the_whole_hessian(method, temperature: float, masked: bool):
    model, data = tiny(), batches(2)
    masks = None
    if masked:
        masks = drive.prune(model, data, LOSS, method="snip", sparsity=0.3, progress=False)
    expected = hessian_times_gradient(model, data, temperature, masks)
    for name, score in scores_of(method, model, data, masks, accumulate=2).items():
        theta = model.get_parameter(name).detach() * expected[name]
        theta = theta if method.name == "grasp" else theta.abs()
        torch.testing.assert_close(score, theta, rtol=1e-9, atol=1e-16)


def linear(depth: int, width: int) -> nn.Sequential:
    torch.manual_seed(3)
    sizes = [6, *[width] * (depth - 1), 4]
    layers = [nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)]
    return nn.Sequential(*layers)


def test_synflow_of_a_linear_network_in_closed_form():
    """R = 1^T |W3| |W2| |W1| 1."""
    model = linear(3, 5)
    data = [(torch.randn(2, 6), torch.tensor([0, 1]))]
    w1, w2, w3 = (layer.weight.detach().double().abs() for layer in model)
    ones = torch.ones
    row, column = ones(4).double() @ w3, w1 @ ones(6).double()
    expected = [
        torch.outer(row @ w2, ones(6).double()) * w1,
        torch.outer(row, column) * w2,
        torch.outer(ones(4).double(), w2 @ column) * w3,
    ]
    found = scores_of(methods.SynFlow(), model, data)
    for score, value in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(score, value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("depth", (4, 150))
def test_synflow_is_conserved_from_layer_to_layer(depth: int):
    """Without biases the scores of every layer add up to R: also with ReLU, and at 150 layers."""
    model = linear(depth, 64)
    model = nn.Sequential(*[part for layer in model for part in (layer, nn.ReLU())])
    found = scores_of(methods.SynFlow(), model, [(torch.randn(2, 6), torch.tensor([0, 1]))])
    sums = torch.stack([score.sum() for score in found.values()])
    assert len(sums) == depth and sums.isfinite().all() and sums.min() > 0
    torch.testing.assert_close(sums, sums[:1].expand(depth), rtol=1e-10, atol=0)


def test_synflow_does_not_overflow_in_wide_deep_networks():
    torch.manual_seed(0)
    layers = [nn.Linear(512, 512, bias=False) for _ in range(100)]
    masks = drive.prune(
        nn.Sequential(*layers), [(torch.randn(1, 512), torch.tensor([0]))], LOSS, method="synflow",
        iterations=2, sparsity=0.9, progress=False,
    )  # fmt: skip
    assert all(mask.any() for mask in masks.values())


def test_synflow_wants_numbers():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
    with pytest.raises(
        ValueError, match="synflow: .* one floating-point tensor as inputs.*, got torch.int64"
    ):
        drive.prune(model, [(torch.tensor([1]), 0)], LOSS, method="synflow", sparsity=0.5, progress=False)


@pytest.mark.parametrize(("p", "q"), [(p, q) for p in range(4) for q in range(4) if p + q])
@pytest.mark.parametrize("scale", (1.0, 1e-25))
def test_powers_rank_without_underflow(p: int, q: int, scale: float):
    """abs(theta)^p abs(G)^q; with gradients of 1e-25 their cubes are below the range of float32."""
    model = tiny().float()
    data = [(x.float(), y) for x, y in batches()]

    def loss(outputs, targets):
        return LOSS(outputs, targets) * scale

    loss(model(data[0][0]), data[0][1]).backward()
    weights = {n: w.detach().double().clone() for n, w in model.named_parameters() if w.dim() > 1}
    grads = {n: model.get_parameter(n).grad.double() for n in weights}
    method = methods.Drive(powers=(p, q))
    masks = drive.prune(model, data, loss, method=method, sparsity=0.6, iterations=1, progress=False)
    score = torch.cat([(weights[n].abs().log() * p + grads[n].abs().log() * q).flatten() for n in weights])
    kept = torch.cat([masks[n].flatten() for n in weights])
    assert int(kept.sum()) == kept.numel() - round(0.6 * kept.numel())
    assert score[kept].min() >= score[~kept].max() - 1e-6, "log-scores; float32 products round to 6e-8"


@pytest.mark.parametrize(
    ("terms", "powers"),
    (
        (("magnitude", "connection", "convergence"), (2, 2)),
        (("magnitude", "connection"), (2, 1)),
        (("connection", "convergence"), (1, 2)),
        (("magnitude", "convergence"), (1, 1)),
        (("magnitude",), (1, 0)),
        (("connection",), (1, 1)),
        (("convergence",), (0, 1)),
    ),
)
def test_terms_span_the_family(terms: tuple[str, ...], powers: tuple[int, int]):
    """dL/dm = theta G, dL/dtheta = G for a survivor."""
    assert methods.Drive(terms=terms).powers == powers


def test_terms_that_do_not_exist():
    with pytest.raises(
        ValueError, match="terms must be among magnitude, connection, convergence, got 'size'"
    ):
        methods.Drive(terms=["size"])
    with pytest.raises(ValueError, match=r"powers must be whole, 0 to 3 and not both 0, got \(0, 0\)"):
        methods.Drive(powers=(0, 0))


def test_signed_scores_keep_their_order():
    """Of float32: zeros are one, denormals count, NaN and infinities stay what they are."""
    values = torch.tensor([-3e38, -2.0, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1e-30, 1.0, 3e38])
    found = ordered(values)
    assert found.dtype == torch.float64 and (found >= 0).all() and found[4] == found[5]
    assert (found.diff()[[0, 1, 2, 3, 5, 6, 7, 8]] > 0).all()
    random = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ordered(random).argsort(), random.argsort())
    assert ordered(torch.tensor([torch.nan])).isnan() and ordered(torch.tensor([-torch.inf])) == -torch.inf


@pytest.mark.parametrize("method", (methods.Snip(), methods.Drive(), methods.Grasp(), methods.Crop()))
def test_micro_batches_are_one_large_batch(method):
    """The mean of four batches of 6 is the batch of 24: float64, to 1e-12 of the score."""
    model = tiny()
    small = batches(4, size=6)
    large = [(torch.cat([x for x, _ in small]), torch.cat([y for _, y in small]))]
    pieces = scores_of(method, model, small, accumulate=4)
    whole = scores_of(method, model, large, accumulate=1)
    for name, score in pieces.items():
        factor = 16.0 if method.name in ("grasp", "crop") else 1.0  # these sum: (4 g)^T (4 H)
        torch.testing.assert_close(score / factor, whole[name], rtol=1e-12, atol=1e-18)


def test_magnitude_is_global_unstructured():
    """torch's own, away from ties."""
    model, other = tiny(), tiny()
    masks = drive.prune(model, [], LOSS, method="magnitude", sparsity=0.7, progress=False)
    layers = [(other[i], "weight") for i in (0, 2, 4)]
    torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=0.7)
    for index in (0, 2, 4):
        assert torch.equal(masks[f"{index}.weight"], other[index].weight_mask.bool())


def test_random_is_of_the_seed_alone():
    runs = [
        drive.prune(tiny(), [], LOSS, method="random", sparsity=0.5, seed=seed, progress=False)
        for seed in (0, 0, 1)
    ]
    same = [all(torch.equal(runs[0][n], run[n]) for n in run) for run in runs]
    assert same == [True, True, False]
