"""Whole runs of methods against simulations of their papers: which entries survive, and at what cost."""

from __future__ import annotations

import copy
import math
import weakref

import pytest
import torch
from torch import nn

import drive
from drive import Masks, methods
from drive._scoring.feed import Passes
from drive._scoring.loss import Loss
from drive._scoring.sgd import sgd_round

LOSS = nn.functional.cross_entropy


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A CNN whose BatchNorm has statistics and negative parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.Flatten(), nn.Linear(36, 5)
    )
    with torch.no_grad():
        for tensor in (model[1].weight, model[1].bias, model[1].running_mean):
            tensor.normal_()
        model[1].running_var.uniform_(0.5, 2)
    return model.to(dtype).eval()


def batches(count: int, size: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 2, 5, 5, generator=generator, dtype=torch.float64),
            torch.randint(5, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def prune(model: nn.Module, data, **options) -> Masks:
    return drive.prune(model, data, LOSS, **{"progress": False, **options})


def same(a: Masks, b: Masks) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: w.detach().clone() for name, w in model.named_parameters() if w.dim() > 1}


# Micro-batches


@pytest.mark.parametrize("method", ("snip", "drive", "grasp", "crop"))
def test_masks_of_micro_batches_are_those_of_the_large_batch(method: str):
    """Three iterations, each on four batches of 6 or on one of 24: the same masks (float64, no ties)."""
    small, options = batches(12), {"method": method, "sparsity": 0.8, "iterations": 3}
    large = [tuple(torch.cat(parts) for parts in zip(*small[i : i + 4], strict=True)) for i in (0, 4, 8)]
    assert same(
        prune(network(), small, accumulate=4, **options), prune(network(), large, accumulate=1, **options)
    )


class Alive:
    """Bytes that autograd has saved, and the most there ever were. A tensor saved twice counts twice."""

    def __init__(self):
        self.bytes = self.peak = 0

    def pack(self, tensor: torch.Tensor):
        size = tensor.numel() * tensor.element_size()
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        saved = [tensor.detach()] if tensor.is_leaf else [tensor]

        class Saved(list):
            pass

        found = Saved(saved if not tensor.requires_grad else [tensor])
        weakref.finalize(found, self.free, size)
        return found

    def free(self, size: int):
        self.bytes -= size


@pytest.mark.parametrize("method", ("grasp", "crop"))
def test_a_second_order_score_holds_the_graph_of_one_micro_batch(method: str):
    def peak(count: int, size: int) -> int:
        alive = Alive()
        with torch.autograd.graph.saved_tensors_hooks(alive.pack, lambda saved: saved[0]):
            prune(
                network(), batches(count, size), method=method, sparsity=0.5, iterations=1, accumulate=count
            )
        assert alive.bytes == 0, "and nothing afterwards"
        return alive.peak

    assert peak(8, 6) == peak(1, 6) < peak(1, 48) / 2


# Second-order scores


def test_grasp_keeps_the_largest_signed_scores_of_the_whole_hessian():
    """theta * (H g), its sign counts; ranked in float32: within 1e-6 of the cut either may go."""
    model, data = network(), batches(1)
    weights, (inputs, targets) = weights_of(model), data[0]
    sizes = [w.numel() for w in weights.values()]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = zip(weights.items(), flat.split(sizes), strict=True)
        outputs = torch.func.functional_call(model, {n: p.view(w.shape) for (n, w), p in parts}, (inputs,))
        return LOSS(outputs / 200, targets)

    flat = torch.cat([w.flatten() for w in weights.values()])
    hessian = torch.autograd.functional.hessian(loss, flat)
    scores = flat * (hessian @ torch.autograd.functional.jacobian(loss, flat))
    masks = prune(model, data, method="grasp", sparsity=0.7)
    kept = torch.cat([masks[name].flatten() for name in weights])
    assert int(kept.sum()) == len(flat) - round(0.7 * len(flat))
    assert scores[kept].min() >= scores[~kept].max() - 1e-6 * scores.abs().max()
    assert (scores[~kept] < 0).any() and scores[~kept].abs().max() > scores[kept].min(), "not |score|"


class Attention(nn.Module):
    """An encoder layer, whose attention is the fused one, and outputs in a dict."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True, dtype=torch.float64)
        self.head = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, inputs):
        return {"logits": self.head(self.layer(inputs["x"]).mean(1)), "names": ["a"], "length": 5}


@pytest.mark.parametrize(("method", "temperature"), (("grasp", 200.0), ("crop", 1.0)))
def test_second_order_scores_of_fused_attention_and_nested_outputs(method: str, temperature: float):
    """H g by central differences of the gradient along g (float64: to 1e-6 of the largest)."""
    model = Attention()
    x, y = torch.randn(6, 5, 4, dtype=torch.float64), torch.arange(6) % 3
    found = {}

    class Watched(type(methods.get(method))):
        def rank(self, problem):
            ranking = super().rank(problem)
            given = ranking.scores or {n: w * ranking.gradients[n] for n, w in problem.weights.items()}
            found.update({name: score.detach().clone() for name, score in given.items()})
            return ranking

    reference = copy.deepcopy(model)
    drive.prune(
        model, [({"x": x}, y)], lambda out, y: LOSS(out["logits"], y), method=Watched(), sparsity=0.5,
        iterations=1, schedule="one_shot", accumulate=1, progress=False,
    )  # fmt: skip
    weights = [reference.get_parameter(name) for name in found]

    def gradients() -> list[torch.Tensor]:
        loss = LOSS(reference({"x": x})["logits"] / temperature, y)
        return list(torch.autograd.grad(loss, weights))

    start, direction = [w.detach().clone() for w in weights], gradients()
    step = 1e-4 / math.sqrt(sum(float(g.square().sum()) for g in direction))
    moved = []
    for sign in (1, -1):
        with torch.no_grad():
            for w, old, g in zip(weights, start, direction, strict=True):
                w.copy_(old + sign * step * g)
        moved.append(gradients())
    scale = max(float(score.abs().max()) for score in found.values())
    for score, theta, up, down in zip(found.values(), start, *moved, strict=True):
        torch.testing.assert_close(score, theta * (up - down) / (2 * step), rtol=0, atol=1e-6 * scale)


# SynFlow


def test_synflow_takes_absolute_values_of_the_whole_state():
    """dR/dm by central differences of R, written out for the CNN: float64, to 1e-6 of the largest."""
    model = network()
    norm = model[1]
    state = {name: tensor.abs() for name, tensor in model.state_dict().items()}

    def flow(first: torch.Tensor, last: torch.Tensor) -> float:
        ones = torch.ones(1, 2, 5, 5, dtype=torch.float64)
        hidden = nn.functional.conv2d(ones, first, state["0.bias"])
        scale = state["1.weight"] / (state["1.running_var"] + norm.eps).sqrt()
        hidden = (hidden - state["1.running_mean"].view(-1, 1, 1)) * scale.view(-1, 1, 1)
        hidden = nn.functional.softplus(hidden + state["1.bias"].view(-1, 1, 1)).flatten(1)
        return float((hidden @ last.T + state["4.bias"]).sum())

    def slope(first: torch.Tensor, last: torch.Tensor, which: int, entry: int) -> float:
        step = torch.ones((first, last)[which].numel(), dtype=torch.float64)
        step[entry] += 1e-5
        up = [first, last]
        up[which] = up[which] * step.view_as(up[which])
        step[entry] -= 2e-5
        down = [first, last]
        down[which] = down[which] * step.view_as(down[which])
        return (flow(*up) - flow(*down)) / 2e-5

    values = state["0.weight"], state["4.weight"]
    scores = {
        name: torch.tensor([slope(*values, which, i) for i in range(tensor.numel())]).view_as(tensor).double()
        for which, (name, tensor) in enumerate(zip(("0.weight", "4.weight"), values, strict=True))
    }
    found = {}

    class Watched(methods.SynFlow):
        def rank(self, problem):
            ranking = super().rank(problem)
            found.update({name: score.clone() for name, score in ranking.scores.items()})
            return ranking

    prune(model.train(), batches(1), method=Watched(), sparsity=0.5, iterations=1)
    top = max(float(score.max()) for score in scores.values())
    for name, score in scores.items():
        torch.testing.assert_close(found[name], score, rtol=0, atol=1e-6 * top)
    assert found.keys() == scores.keys()


def test_synflow_is_finite_and_conserved_at_150_wide_layers():
    """R is about 1e200 with He's initialisation: beyond float32, within float64."""
    torch.manual_seed(0)
    layers = [nn.utils.skip_init(nn.Linear, 512, 512, bias=False) for _ in range(150)]
    with torch.no_grad():
        noise = torch.randn(512, 512) * math.sqrt(2 / 512)
        for number, layer in enumerate(layers):
            layer.weight.copy_(noise.roll(number))
    sums = []

    class Watched(methods.SynFlow):
        def rank(self, problem):
            ranking = super().rank(problem)
            sums.extend(float(score.sum()) for score in ranking.scores.values())
            return ranking

    data = [(torch.ones(1, 512), torch.tensor([0]))]
    masks = prune(nn.Sequential(*layers), data, method=Watched(), sparsity=0.9, iterations=1)
    assert len(sums) == 150 and 1e180 < sums[0] < math.inf
    assert sums == pytest.approx([sums[0]] * 150, rel=1e-10)
    assert masks.sparsity() == pytest.approx(0.9, abs=1e-7)


# Training


def test_early_crop_is_crop_on_the_trained_network():
    trained, model = network().train(), network().train()
    data, options = batches(4), {"sparsity": 0.9, "iterations": 4, "accumulate": 2}
    train = sgd_round(Passes(batches(3)), Loss(LOSS), lr=0.05)
    early = prune(model, data, method=methods.EarlyCrop(latest=2), train=train, **options)
    for number in range(2):
        train(trained, None, number)
    assert same(early, prune(trained, data, method="crop", **options))
    for name, tensor in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("scope", ("erk", "uniform"))
@pytest.mark.parametrize("fraction", (0.0, 0.3, 1.0))
def test_rigl_against_a_simulation(scope: str, fraction: float):
    """Every mask and weight of five iterations, layer by layer, by sorting in float64 (to 1e-12)."""
    model, data = network(), batches(4)
    simulated = copy.deepcopy(model)
    steps: list[tuple[dict, dict, dict]] = []  # masks, weights before a round, after it

    def train(model, masks, number):
        assert number == len(steps)
        before = weights_of(model)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, mask in masks.items():
                noise = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
                model.get_parameter(name).add_(noise * mask)
        steps.append(({n: m.clone() for n, m in masks.items()}, before, weights_of(model)))

    method = methods.RigL(fraction=fraction)
    masks = prune(model, data, method=method, sparsity=0.7, iterations=5, scope=scope, train=train)
    steps.append((dict(masks), weights_of(model), {}))
    assert len(steps) == 5
    for number in range(1, 5):
        (old, _, trained), (new, weights, _) = steps[number - 1], steps[number]
        simulated.load_state_dict({**simulated.state_dict(), **trained})
        inputs, targets = data[number - 1]  # the first ranking is random and takes none
        loss = LOSS(simulated(inputs), targets)
        names = list(old)
        grads = torch.autograd.grad(loss, [simulated.get_parameter(name) for name in names])
        for name, grad in zip(names, grads, strict=True):
            alive = old[name].flatten()
            count = int(alive.sum())
            drop = int(fraction / 2 * (1 + math.cos(math.pi * number / 5)) * count)
            by_size = trained[name].abs().flatten().masked_fill(~alive, -1).argsort(descending=True)
            stay = torch.zeros_like(alive).index_fill(0, by_size[: count - drop], True)
            stay, grown = stay.view_as(grad), new[name] & ~stay.view_as(grad)
            assert (new[name] | ~stay).all() and int(new[name].sum()) == count, "what stays, stays"
            best = grad[~stay].abs().sort(descending=True).values[:drop]  # dead channels' gradients tie
            torch.testing.assert_close(
                grad[grown].abs().sort(descending=True).values, best, rtol=1e-12, atol=0
            )
            kept = trained[name] * (new[name] & old[name])  # also of those dropped and grown at once
            assert torch.equal(weights[name], kept), "grown weights start at zero"


def test_rigl_stops_dropping_where_the_cosine_ends():
    """f_n = fraction / 2 (1 + cos(n pi / N)): of 100 survivors and fraction 0.5."""
    model = nn.Sequential(nn.Linear(20, 10, bias=False))
    data = [(torch.randn(8, 20), torch.randint(10, (8,)))]
    stays = []

    class Watched(methods.RigL):
        def rank(self, problem):
            ranking = super().rank(problem)
            if ranking.revive:
                stays.append(int((ranking.scores["0.weight"] >= 2.0**200).sum()))
            return ranking

    prune(model, data, method=Watched(0.5), sparsity=0.5, iterations=5)
    assert stays == [100 - int(25 * (1 + math.cos(n * math.pi / 5))) for n in (1, 2, 3, 4)]
    assert stays == [55, 68, 83, 96]


@pytest.mark.parametrize("name", [name for name in methods.names() if methods.get(name).stage == "training"])
def test_a_method_that_trains_cannot_be_captured(name: str):
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"prune: capture .*got True|prune: capture needs CUDA"):
        prune(model, batches(1), method=name, sparsity=0.5, capture=True)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("error", (KeyboardInterrupt(), RuntimeError("no more memory")))
def test_what_a_failed_training_did_to_buffers_and_modes_is_undone(error: BaseException):
    """A training that replaces buffers, freezes BatchNorm and uses the RNG."""
    model = network().train()
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    buffers, rng = dict(model.named_buffers()), torch.get_rng_state()

    def train(model, masks, number):
        torch.randn(3)
        model.train()
        with torch.no_grad():
            for w in model.parameters():
                w.normal_()
                w.grad = torch.zeros_like(w)
        model[1].running_mean = torch.full_like(model[1].running_mean, 5)
        model[1].num_batches_tracked += 3
        if number == 1:
            raise error

    with pytest.raises(type(error)):
        prune(model, batches(1), method="gradual", sparsity=0.5, train=train)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    grads = [p.grad for p in model.parameters()]
    assert (grads[0] == 1).all() and not any(grad is not None for grad in grads[1:])
