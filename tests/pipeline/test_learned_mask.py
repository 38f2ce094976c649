"""A mask that is learned: values, gradients, penalties, pruning by it, and the model that comes back."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from worlds import returned, run

import drive
from drive.pipeline import LearnedMask, hadamard_init_
from drive.reference import drive_prune
from drive.targets import prunable
from drive.targets.wrappers import unwrap

FORWARDS = ("expectation", "sample", "round")


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3, bias=False))


def learned(seed: int = 0, model: nn.Module | None = None, **options: Any) -> LearnedMask:
    found = LearnedMask(network(seed) if model is None else model, **options)
    with torch.no_grad():
        for logit in found.logits():
            logit.copy_(torch.randn_like(logit) * 2)
    return found


def batch(count: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 6, generator=generator), torch.arange(count) % 3


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("straight_through", (True, False))
def test_values_and_gradients(forward: str, straight_through: bool):
    """Of one linear layer, by hand: with output W x and loss sum(c * output), dL/dW is c x^T."""
    layer = nn.Linear(5, 4, bias=False).double()
    wrapper = learned(model=layer, forward=forward, straight_through=straight_through).train()
    x, c = torch.randn(5).double(), torch.randn(4).double()
    (logit,) = wrapper.logits()
    p = logit.detach().sigmoid()
    torch.manual_seed(3)
    m = {
        "expectation": lambda: p,
        "sample": lambda: torch.bernoulli(p),
        "round": lambda: (p >= 0.5).double(),
    }[forward]()
    torch.manual_seed(3)
    out = wrapper(x)
    assert torch.equal(out, F.linear(x, layer.weight * m))
    (c * out).sum().backward()
    outer = torch.outer(c, x)
    torch.testing.assert_close(
        layer.weight.grad, outer if straight_through else outer * m, rtol=1e-13, atol=0
    )
    torch.testing.assert_close(logit.grad, outer * layer.weight * p * (1 - p), rtol=1e-12, atol=1e-15)


def test_gradients_by_finite_differences():
    """Of the expectation, where nothing is passed straight through: all of them, penalties included."""
    wrapper = learned(model=network().double(), straight_through=False, density=2.0, undecided=0.7).eval()
    x, y = batch(8)
    parameters = [*wrapper.logits(), *wrapper.weights()]

    def loss(*_: Tensor) -> Tensor:
        return F.cross_entropy(wrapper(x.double()), y) + 50 * wrapper.penalty()

    assert torch.autograd.gradcheck(loss, parameters, eps=1e-6, atol=1e-7)


def test_penalty_by_hand():
    wrapper = learned(density=3.0, undecided=0.5)
    p = torch.cat([logit.detach().sigmoid().flatten() for logit in wrapper.logits()])
    expected = 3.0 * p.mean() + 0.5 * (p * (1 - p)).mean()
    torch.testing.assert_close(wrapper.penalty().detach(), expected)
    assert sum(state.penalty for state in wrapper.layer_states()) == pytest.approx(float(expected), rel=1e-5)
    (first, last) = wrapper.layer_states()
    assert (first.name, first.entries, last.name, last.entries) == ("0.weight", 48, "3.weight", 24)
    p = wrapper.probabilities()["0.weight"]
    assert first.density == pytest.approx(float(p.mean())) and first.open == float((p > 0.5).double().mean())


@pytest.mark.parametrize(
    ("delay", "ramp", "factors"),
    (
        (0.0, 0.0, {0.0: 1.0, 0.5: 1.0, 1.0: 1.0}),
        (0.25, 0.0, {0.0: 0.0, 0.2: 0.0, 0.25: 1.0, 1.0: 1.0}),
        (0.0, 0.5, {0.0: 0.0, 0.25: 0.5, 0.5: 1.0, 1.0: 1.0}),
        (0.2, 0.4, {0.0: 0.0, 0.2: 0.0, 0.3: 0.25, 0.4: 0.5, 0.7: 1.0}),
    ),
)
def test_ramps(delay: float, ramp: float, factors: dict[float, float]):
    wrapper = learned(delay=delay, ramp=ramp)
    full = float(learned().penalty())
    for progress, factor in factors.items():
        wrapper.at(progress)
        assert float(wrapper.penalty()) == pytest.approx(factor * full, rel=1e-5, abs=1e-12)


def train(wrapper: nn.Module, steps: int, optimizers: list[torch.optim.Optimizer] | None = None) -> list[Any]:
    inner = wrapper if isinstance(wrapper, LearnedMask) else wrapper.module
    optimizers = optimizers or [
        torch.optim.SGD(inner.weights(), lr=0.1, momentum=0.9),
        torch.optim.Adam(inner.logits(), lr=0.1),
    ]
    x, y = batch()
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        (F.cross_entropy(wrapper(x), y) + inner.penalty()).backward()
        for optimizer in optimizers:
            optimizer.step()
    return optimizers


def test_masks_close_with_the_penalty():
    densities = []
    for factor in (0.0, 1.0, 10.0):
        wrapper = LearnedMask(network(), density=factor, undecided=factor)
        train(wrapper, 40)
        densities.append(sum(s.open * s.entries for s in wrapper.layer_states()))
    assert densities[0] > densities[1] > densities[2]


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_folding_is_exact(forward: str, dtype: torch.dtype):
    wrapper = learned(model=network().to(dtype), forward=forward).eval()
    x = batch()[0].to(dtype)
    expected = wrapper(x)
    model = wrapper.finish()
    assert type(model) is nn.Sequential and torch.equal(model(x), expected)


def test_without_folding_weights_stay():
    wrapper = learned()
    before = copy.deepcopy(wrapper.module.state_dict())
    after = wrapper.finish(fold=False).state_dict()
    assert (
        all(torch.equal(after[name], tensor) for name, tensor in before.items())
        and before.keys() == after.keys()
    )


def test_the_model_can_be_taken_back_once():
    wrapper = learned()
    wrapper.finish()
    for call in (wrapper.finish, wrapper.penalty, lambda: wrapper(batch()[0])):
        with pytest.raises(RuntimeError, match="has taken the model back"):
            call()


@pytest.mark.parametrize("sparsity", (0.0, 0.5, 0.9))
def test_pruned_by_weight_times_probability(sparsity: float):
    wrapper = learned()
    weights = {n: w.detach().clone() for n, w in prunable(wrapper).items()}
    p = wrapper.probabilities()
    oracle = drive_prune({n: w.clone() for n, w in weights.items()}, p, sparsity=sparsity).masks
    masks = drive.prune(wrapper, [], method="learned-mask", sparsity=sparsity, progress=False)
    assert list(masks) == ["0.weight", "3.weight"]
    for name, mask in masks.items():
        assert torch.equal(mask, oracle[name])
        assert torch.equal(wrapper.module.get_parameter(name), weights[name] * mask)
    assert int(sum((~m).sum() for m in masks.values())) == round(sparsity * 72)
    x = batch()[0]
    wrapper.eval()
    assert torch.equal(wrapper(x), wrapper.finish()(x))


def test_weights_without_logits_count_with_one():
    wrapper = learned(include="0.*")
    assert list(wrapper.probabilities()) == ["0.weight"]
    masks = drive.prune(wrapper, [], method="learned-mask", sparsity=0.5, progress=False)
    assert list(masks) == ["0.weight", "3.weight"] and masks["3.weight"].any()


def test_another_model_is_refused():
    with pytest.raises(
        ValueError, match=r"learned-mask: model must be a drive.pipeline.LearnedMask, got Sequential"
    ):
        drive.prune(network(), [], method="learned-mask", sparsity=0.5, progress=False)


def test_other_methods_prune_the_model_inside():
    wrapper = learned()
    masks = drive.prune(wrapper, [batch()], F.cross_entropy, method="snip", sparsity=0.5, progress=False)
    assert list(masks) == ["0.weight", "3.weight"]
    assert drive.coverage(wrapper).total == sum(p.numel() for p in wrapper.module.parameters())
    gradual = drive.prune(
        wrapper, [batch()], F.cross_entropy, method="gradual", iterations=2, sparsity=0.5, progress=False
    )
    assert gradual.sparsity() == 0.5


def test_masks_are_held_on_the_model_inside():
    wrapper = learned()
    masks = drive.prune(wrapper, [], method="learned-mask", sparsity=0.5, progress=False)
    masks.attach(wrapper)
    optimizers = train(wrapper, 3)
    for name, mask in masks.items():
        assert not wrapper.module.get_parameter(name)[~mask].any()
    model = wrapper.finish()
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    optimizers[0].step()
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in masks.items())


def test_names_states_and_copies():
    wrapper = learned()
    assert unwrap(wrapper) is wrapper.module and list(prunable(wrapper)) == list(prunable(wrapper.module))
    inner = [name for name, _ in network().named_parameters()]
    assert [name for name, _ in wrapper.module.named_parameters()] == inner
    x = batch()[0]
    wrapper.eval()
    for other in (copy.deepcopy(wrapper), pickle.loads(pickle.dumps(wrapper))):
        assert torch.equal(other(x), wrapper(x))
    fresh = LearnedMask(network(1)).eval()
    fresh.load_state_dict(wrapper.state_dict())
    assert torch.equal(fresh(x), wrapper(x))


def test_a_training_that_is_killed_goes_on_to_the_bit(tmp_path):
    def start() -> tuple[LearnedMask, list[torch.optim.Optimizer]]:
        wrapper = LearnedMask(network(), ramp=0.5)
        return wrapper, train(wrapper, 0)

    whole, optimizers = start()
    for progress in (0.0, 0.25, 0.5, 0.75):
        whole.at(progress)
        train(whole, 2, optimizers)
        if progress == 0.25:
            state = {"model": whole.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            torch.save(state, tmp_path / "state.pt")
    again, optimizers = start()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    for progress in (0.5, 0.75):
        again.at(progress)
        train(again, 2, optimizers)
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_layers_that_close_are_named_once(caplog: pytest.LogCaptureFixture):
    wrapper = LearnedMask(network())
    with torch.no_grad():
        wrapper.logits()[1].fill_(-9)
    with caplog.at_level(logging.WARNING):
        wrapper.at(0.1)
        wrapper.at(0.2)
    (record,) = caplog.records
    assert "3.weight closes: of its 24 entries less than one is kept" in record.getMessage()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.lstm = (
            nn.MultiheadAttention(6, 2, batch_first=True),
            nn.LSTM(6, 6, batch_first=True),
        )
        self.head = nn.Linear(6, 3)
        self.tied = nn.Linear(6, 3)
        self.tied.weight = self.head.weight

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        x = self.attention(x, x, x, need_weights=False)[0]
        return {"logits": self.tied(self.head(self.lstm(x)[0]) @ torch.ones(3, 6)) * scale}


@pytest.mark.parametrize("training", (True, False))
def test_layers_of_other_kinds(training: bool):
    """Attention, recurrent layers, tied weights, keyword arguments: as with the products in place."""
    torch.manual_seed(0)
    model = Attention()
    wrapper = learned(model=model).train(training)
    x = torch.randn(2, 5, 6)
    found = wrapper(x, scale=2.0)["logits"]
    folded = copy.deepcopy(wrapper).finish().train(training)
    assert torch.equal(found, folded(x, scale=2.0)["logits"])
    found.sum().backward()
    assert all(logit.grad is not None and logit.grad.abs().sum() > 0 for logit in wrapper.logits())


def test_normalised_weights():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)))
    wrapper = learned(model=model).eval()
    x = batch()[0]
    expected = wrapper(x)
    assert torch.equal(expected, wrapper.finish()(x))


def test_autocast():
    wrapper = learned()
    x, y = batch()
    with torch.autocast("cpu", torch.bfloat16):
        out = wrapper(x)
        F.cross_entropy(out, y).backward()
    assert out.dtype == torch.bfloat16 and all(
        logit.grad.dtype == torch.float32 for logit in wrapper.logits()
    )


@pytest.mark.parametrize("forward", ("expectation", "round"))
def test_compiled(forward: str):
    torch.compiler.reset()
    eager, other = learned(forward=forward), learned(forward=forward)
    compiled = torch.compile(other, backend="aot_eager")
    x, y = batch()
    for progress in (0.0, 0.5):
        for model, inner in ((eager, eager), (compiled, other)):
            inner.at(progress)
            inner.zero_grad()
            (F.cross_entropy(model(x), y) + inner.penalty()).backward()
    for a, b in zip(eager.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert list(prunable(compiled)) == ["0.weight", "3.weight"]


def copies() -> None:
    """Each rank half of the batch: gradients are those of the whole, of the penalty too; pruning agrees."""
    alone = LearnedMask(network_without_norm())
    both = DistributedDataParallel(LearnedMask(network_without_norm()))
    rank = torch.distributed.get_rank()
    x, y = batch()
    (F.cross_entropy(alone(x), y) + alone.penalty()).backward()
    (F.cross_entropy(both(x[rank::2]), y[rank::2]) + both.module.penalty()).backward()
    for a, b in zip(alone.parameters(), both.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    masks = drive.prune(both, [], method="learned-mask", sparsity=0.5, progress=False)
    expected = drive.prune(alone, [], method="learned-mask", sparsity=0.5, progress=False)
    assert list(masks) == list(expected) == ["0.weight", "2.weight"]
    assert all(torch.equal(masks[name], mask) for name, mask in expected.items())


def network_without_norm() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def test_distributed_data_parallel():
    returned(run(2, copies))


@pytest.mark.parametrize(
    ("options", "words"),
    (
        ({"forward": "mean"}, "forward must be 'expectation', 'sample' or 'round', got 'mean'"),
        ({"density": -1.0}, "density must be at least 0, got -1.0"),
        ({"undecided": float("nan")}, "undecided must be at least 0, got nan"),
        ({"ramp": 1.5}, r"ramp must be in \[0, 1\], got 1.5"),
        ({"exclude": "*"}, "nothing to prune"),
        ({"model": torch.compile(network())}, "model must be what OptimizedModule wraps"),
    ),
)
def test_bad_arguments(options: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        LearnedMask(**{"model": network(), **options})


def test_bad_progress():
    with pytest.raises(ValueError, match=r"progress must be in \[0, 1\], got 2"):
        learned().at(2)


def test_a_start_of_zeros_grows_where_the_gradient_passes_the_mask():
    """ZerO: without it, a weight that is 0 gets p times its gradient, and its mask none at all."""
    moved = []
    for straight_through in (True, False):
        model = network()
        hadamard_init_(model)
        wrapper = LearnedMask(model, straight_through=straight_through)
        train(wrapper, 10)
        moved.append(float(sum(w.abs().sum() for w in prunable(wrapper).values())))
    assert moved[0] > moved[1]
