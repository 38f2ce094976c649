"""drive.prune: methods, schedules, and what scoring leaves untouched."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

import drive
from drive import Masks, methods, schedules

LOSS = nn.functional.cross_entropy


def network(seed: int = 0, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(216, 10),
    )


def batches(count: int = 5, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(8, 1, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator))
        for _ in range(count)
    ]


def prune(model: nn.Module, data=None, **options) -> Masks:
    return drive.prune(model, batches() if data is None else data, LOSS, **{"progress": False, **options})


def same(a: Masks, b: Masks) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", methods.names())
def test_every_method_reaches_the_sparsity(method: str):
    model = network()
    masks = prune(model, method=method, sparsity=0.9)
    total = 54 + 2160
    assert sum(int((~m).sum()) for m in masks.values()) == round(0.9 * total)
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)


def test_drive_is_iterative_snip():
    """docs/method.md: the ranking is the same on the same weights, batches and schedule."""
    options = {"sparsity": 0.95, "iterations": 20, "schedule": "exponential"}
    one, two = network(), network()
    assert same(prune(one, method="drive", **options), prune(two, method="snip", **options))
    assert torch.equal(one[5].weight, two[5].weight)
    once, shot = network(), network()
    assert same(
        prune(once, method="drive", sparsity=0.9, iterations=1), prune(shot, method="snip", sparsity=0.9)
    )


def test_snip_is_theta_times_gradient():
    model = network()
    reference = copy.deepcopy(model)
    masks = prune(model, method="snip", sparsity=0.8)
    inputs, targets = batches()[0]
    LOSS(reference(inputs), targets).backward()
    scores = {n: (reference.get_parameter(n) * reference.get_parameter(n).grad).abs() for n in masks}
    kept = torch.cat([s.flatten() for s in scores.values()]).topk(2214 - round(0.8 * 2214)).values[-1]
    for name, score in scores.items():
        assert torch.equal(masks[name], score >= kept)


def test_magnitude_keeps_the_largest_weights():
    model = network()
    weights = {n: model.get_parameter(n).detach().clone() for n in ("0.weight", "5.weight")}
    masks = prune(model, data=[], method="magnitude", sparsity=0.75)  # needs no data
    flat = torch.cat([w.abs().flatten() for w in weights.values()])
    kept = flat.topk(2214 - round(0.75 * 2214)).values[-1]
    for name, weight in weights.items():
        assert torch.equal(masks[name], weight.abs() >= kept)


def test_a_fresh_batch_each_iteration():
    seen = []
    data = batches(3)

    def loss(outputs, targets):
        seen.append(targets)
        return LOSS(outputs, targets)

    drive.prune(network(), data, loss, sparsity=0.5, iterations=7, progress=False)
    assert [t.tolist() for t in seen] == [data[i % 3][1].tolist() for i in range(7)]


@pytest.mark.parametrize(
    ("method", "iterations", "taken"), (("drive", 7, 7), ("snip", 1, 1), ("magnitude", 3, 0))
)
def test_no_batch_is_read_ahead(method: str, iterations: int, taken: int):
    data = iter(batches(10))
    prune(network(), data=data, method=method, iterations=iterations, sparsity=0.5)
    assert len(list(data)) == 10 - taken


class TwoInputs(nn.Module):
    """Takes a dict, returns one."""

    def __init__(self):
        super().__init__()
        self.layers = network()

    def forward(self, inputs):
        images, (more,) = inputs["images"], inputs["more"]
        return {"logits": self.layers(images + more)}


def test_nested_batches():
    data = [({"images": x, "more": [x]}, {"labels": y, "weight": 2}) for x, y in batches()]
    model = TwoInputs()
    masks = drive.prune(
        model, data, lambda y, t: t["weight"] * LOSS(y["logits"], t["labels"]), sparsity=0.9, progress=False
    )
    doubled = [(2 * x, y) for x, y in batches()]
    expected = prune(network(), data=doubled, sparsity=0.9)
    assert all(torch.equal(masks[f"layers.{name}"], mask) for name, mask in expected.items())


def test_packed_sequences_keep_their_lengths_on_the_cpu():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(3, 4), nn.Linear(4, 2)

        def forward(self, sequences):
            return self.head(self.rnn(sequences)[1][0][0])

    packed = nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    assert prune(Last(), data=[(packed, torch.tensor([0, 1]))], sparsity=0.5, iterations=2).sparsity() == 0.5


def test_last_batch_of_another_size():
    data = [*batches(2), (batches(1, seed=9)[0][0][:3], batches(1, seed=9)[0][1][:3])]
    assert prune(network(), data=data, sparsity=0.9, iterations=7).sparsity() == pytest.approx(0.9, abs=1e-3)


def test_autocast():
    """Model and loss in bfloat16, gradients as the weights; the same inside a caller's autocast."""
    seen = []

    def loss(outputs, targets):
        seen.append((outputs.dtype, torch.is_autocast_enabled("cpu")))
        return LOSS(outputs, targets)

    class Remember(methods.Drive):
        def rank(self, problem):
            ranking = super().rank(problem)
            assert {g.dtype for g in ranking.gradients.values()} == {torch.float32}
            return ranking

    options = {"sparsity": 0.9, "iterations": 5, "progress": False}
    model = network()
    masks = drive.prune(model, batches(), loss, method=Remember(), autocast=torch.bfloat16, **options)
    assert set(seen) == {(torch.bfloat16, True)} and not torch.is_autocast_enabled("cpu")
    outside = network()
    with torch.autocast("cpu", torch.bfloat16):
        around = drive.prune(outside, batches(), loss, **options)
    assert same(masks, around), "weights cast before a step are not used after it"
    assert not same(masks, prune(network(), **options))


def test_capture_auto_is_eager_on_the_cpu(caplog: pytest.LogCaptureFixture):
    options = {"sparsity": 0.9, "iterations": 30, "seed": 3}
    with caplog.at_level("INFO"):
        auto = prune(network(dropout=0.5), capture="auto", **options)
    assert "not captured as a CUDA graph: the weights are on cpu" in caplog.text
    assert same(auto, prune(network(dropout=0.5), capture=False, **options))


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


SCORING = [name for name in methods.names() if methods.get(name).stage != "training"]


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("method", SCORING)
def test_scoring_changes_nothing_else(method: str, training: bool):
    model = network(dropout=0.5).train(training)
    model[1].eval()  # a frozen BatchNorm in a model in training
    model[5].weight.requires_grad_(False)
    model[0].weight.grad = torch.full_like(model[0].weight, 7)
    before, rng, modes = everything(model), torch.get_rng_state(), [m.training for m in model.modules()]
    masks = prune(model, method=method, sparsity=0.9, iterations=4)
    for name, tensor in model.state_dict().items():
        expected = before[name].masked_fill(~masks[name], 0) if name in masks else before[name]
        assert torch.equal(tensor, expected), name
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model.modules()] == modes
    assert not model[5].weight.requires_grad and model[5].weight.grad is None
    assert (model[0].weight.grad == 7).all()


def test_seed_decides_dropout():
    runs = [prune(network(dropout=0.5), sparsity=0.9, iterations=3, seed=seed) for seed in (0, 0, 1)]
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


class Interrupted(list):
    """Batches during which someone presses Ctrl-C."""

    def __init__(self, error: BaseException):
        super().__init__(batches())
        self.error = error

    def __iter__(self):
        yield from super().__iter__()
        raise self.error


@pytest.mark.parametrize("error", (KeyboardInterrupt(), RuntimeError("no more memory")))
def test_interrupted_run_leaves_the_model_as_it_was(error: BaseException):
    model = network(dropout=0.5)
    start = prune(network(dropout=0.5), sparsity=0.3)
    kept = copy.deepcopy(start)
    before, rng = everything(model), torch.get_rng_state()
    with pytest.raises(type(error)):
        prune(model, data=Interrupted(error), sparsity=0.9, iterations=10, masks=start)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(torch.get_rng_state(), rng)
    assert same(start, kept)


def test_non_finite_loss_in_the_middle():
    model = network()
    data = batches(3)
    data[2] = (data[2][0] * torch.nan, data[2][1])
    before = everything(model)
    message = r"prune: iteration 3: the loss must be finite, got nan"
    with pytest.raises(ValueError, match=message):
        prune(model, data=data, sparsity=0.9, iterations=5)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_continues_from_masks():
    model = network()
    first = prune(model, sparsity=0.5, iterations=2)
    second = prune(model, sparsity=0.9, iterations=2, masks=first)
    for name in first:
        assert not (second[name] & ~first[name]).any()
    assert first.sparsity() == pytest.approx(0.5, abs=1e-3), "the given masks are not changed"


def test_a_method_in_full():
    class Random(methods.Method):
        name = "random"

        def rank(self, problem):
            return methods.Ranking({name: torch.rand_like(w) / w for name, w in problem.weights.items()})

    assert prune(network(), method=Random(), sparsity=0.5).sparsity() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        ({"sparsity": 1.5}, ValueError, r"prune: sparsity must be in \[0, 1\), got 1.5"),
        ({"method": "nothing"}, ValueError, "method must be one of drive, snip, grasp.* got 'nothing'"),
        ({"iterations": 0}, ValueError, "iterations must be an integer >= 1, got 0"),
        (
            {"schedule": "sudden"},
            ValueError,
            "schedule must be one of one_shot, exponential, .* got 'sudden'",
        ),
        (
            {"schedule": lambda n: 0.5, "iterations": 3},
            ValueError,
            r"schedule\(3\) must be the final sparsity 0.9",
        ),
        ({"schedule": lambda n: 1 / n, "iterations": 3}, ValueError, r"schedule\(1\) must be in"),
        ({"scope": "layer"}, ValueError, "scope must be one of global, uniform, erk, got 'layer'"),
        ({"data": []}, ValueError, "batches must go on .* they are empty"),
        (
            {"data": iter(batches(2)), "iterations": 3},
            ValueError,
            "they ran out after 2 and cannot be started",
        ),
        ({"capture": True}, ValueError, "prune: capture needs CUDA, the weights are on cpu"),
        ({"capture": "always"}, ValueError, "capture must be True, False or 'auto', got 'always'"),
        (
            {"autocast": torch.float16},
            ValueError,
            "autocast must be None or torch.bfloat16, got torch.float16",
        ),
        ({"masks": Masks({})}, ValueError, "there is no mask for 0.weight"),
    ),
)
def test_bad_arguments(options, error, message):
    model = network()
    before = everything(model)
    with pytest.raises(error, match=message):
        prune(model, **{"sparsity": 0.9, **options})
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_weight_outside_the_loss():
    model = network()
    model.extra = nn.Linear(3, 3)
    model.forward = lambda x: nn.Sequential(*list(model)[:6])(x)
    with pytest.raises(ValueError, match="extra.weight has no gradient: the loss does not depend on it"):
        prune(model, sparsity=0.9)


@pytest.mark.parametrize("name", schedules.names())
def test_schedules_rise_to_the_sparsity(name: str):
    plan = schedules.plan(name, 0.98, 50)
    assert len(plan) == 50 and plan[-1] == 0.98
    assert all(a <= b for a, b in pairwise(plan)) and plan[0] >= 0


def test_schedule_formulas():
    assert schedules.exponential(0.98, 100)(50) == pytest.approx(1 - 0.02**0.5)
    assert schedules.linear(0.8, 4)(1) == pytest.approx(0.2)
    assert schedules.cubic(0.8, 4)(2) == pytest.approx(0.8 * (1 - 0.5**3))
    assert schedules.plan(lambda n: 0.9 * n / 3, 0.9, 3) == pytest.approx([0.3, 0.6, 0.9])
