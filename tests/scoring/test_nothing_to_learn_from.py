"""Pruned or trained on nothing: losses that are not finite, batches that count for nothing or run out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import drive
from drive import methods
from drive._scoring.feed import Passes
from drive._scoring.finite import LateChecks, StepCheck
from drive._scoring.loss import Loss
from drive._scoring.sgd import sgd_round

SCORING = ("drive", "snip", "grasp", "crop")
TRAINING = ("gradual", "imp", "rigl", "early_crop")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 6, generator=generator), torch.randint(4, (8,), generator=generator))
        for _ in range(count)
    ]


def prune(model: nn.Module, data: Any, loss_fn: Any = F.cross_entropy, **options: Any) -> drive.Masks:
    return drive.prune(model, data, loss_fn, **{"sparsity": 0.5, "progress": False, **options})


def refused(message: str, data: Any, loss_fn: Any = F.cross_entropy, **options: Any) -> None:
    """With this message, and everything is as it was."""
    model = network()
    before, rng = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        prune(model, data, loss_fn, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training and torch.equal(torch.get_rng_state(), rng)


def spoilt(data: list[tuple[Tensor, Tensor]], at: int, how: str) -> list[tuple[Tensor, Tensor]]:
    """A batch of these as it must not be."""
    x, y = data[at]
    made = {
        "ignored": (x, y * 0 - 100),
        "nan": (x * torch.nan, y),
        "inf": (x * 1e38 * 10, y),
        "none": (x[:0], y[:0]),
    }
    return [*data[:at], made[how], *data[at + 1 :]]


@pytest.mark.parametrize("how", ("ignored", "nan", "inf"))
@pytest.mark.parametrize("method", (*SCORING, *TRAINING))
def test_losses_that_are_not_finite(method: str, how: str):
    first = 2 if method == "rigl" else 1  # at first its masks are random
    refused(
        f"prune: iteration {first}: the loss must be finite, got nan",
        spoilt(batches(1), 0, how),
        method=method,
    )


@pytest.mark.parametrize("at", (1, 2, 3))
@pytest.mark.parametrize("how", ("ignored", "nan"))
def test_in_a_later_iteration(at: int, how: str):
    message = f"prune: iteration {at + 1}: the loss must be finite, got nan"
    refused(message, spoilt(batches(), at, how), method="drive", iterations=4)
    refused(message.replace(str(at + 1), "1"), spoilt(batches(), at, how), method="drive", accumulate=4)


def test_an_infinite_loss_of_finite_gradients():
    refused(
        "prune: iteration 1: the loss must be finite, got inf",
        batches(),
        lambda outputs, targets: F.cross_entropy(outputs, targets) + torch.inf,
    )


def test_a_batch_without_samples():
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    with pytest.raises(ValueError, match="prune: iteration 2: the loss must be finite, got nan"):
        prune(model, spoilt(batches(), 1, "none"), iterations=4)


class OwnLoss(nn.Module):
    """As transformers' models: the loss of labels, of which -100 do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("method", ("drive", "gradual"))
def test_masked_labels_of_a_models_own_loss(method: str):
    model = OwnLoss()
    data = [{"x": x, "labels": torch.full_like(y, -100)} for x, y in batches()]
    with pytest.raises(ValueError, match="the loss must be finite, got nan"):
        prune(model, data, None, method=method)


@pytest.mark.parametrize("structure", ("unstructured", "2x2"))
@pytest.mark.parametrize("at", (0, 1, 2))
def test_sums_over_targets_none_of_which_counts(structure: str, at: int):
    """The loss is 0, and all gradients are."""

    def summed(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="sum")

    said = "100.0% of the entries" if at == 0 else "all of the entries"
    data = spoilt(batches(3), at, "ignored")
    options = {"method": "drive", "iterations": 4, "structure": structure}
    refused(f"prune: iteration {at + 1}: {said} score 0", data, summed, **options)
    assert prune(network(), data, summed, on_ties="index", **options).sparsity() == pytest.approx(
        0.5, abs=0.02
    )


def test_an_iteration_that_prunes_nothing_may_score_anything():
    data = spoilt(batches(3), 1, "ignored")
    options = {"method": "drive", "iterations": 3, "schedule": lambda step: (0.2, 0.2, 0.5)[step - 1]}
    prune(network(), data, lambda o, t: F.cross_entropy(o, t, reduction="sum"), **options)


# ---- a check is one question, asked in one piece


def asked(
    op: str, loss: float | None = 1.0, score_sum: float = 1.0, kept: int = 1, bad: int = 0, **more: Any
):
    numbers = {
        "kept": torch.tensor([kept]),
        "before": torch.tensor([2]),
        "zero_means": "nobody knows",
        **more,
    }
    scores = torch.tensor([0.5, score_sum], dtype=torch.float64)
    told = None if loss is None else torch.tensor(loss, dtype=torch.float64)
    return StepCheck(op, {"a": 3}, torch.tensor([bad]), None, loss=told, scores=scores, **numbers)


def test_what_a_step_is_asked():
    for good in (
        asked("x"),
        asked("x", loss=None),
        asked("x", score_sum=0, kept=2),
        asked("x", score_sum=0, before=None),
    ):
        good.answer()
    asked("x", score_sum=0, zero_means=None).answer()
    for bad, message in (
        (asked("x", loss=torch.inf, bad=2), "^x: the loss must be finite, got inf"),
        (asked("x", bad=2, score_sum=torch.nan), r"^x: non-finite score in a \(2 of 3 entries\)$"),
        (
            asked("x", score_sum=0),
            "^x: all of the entries score 0, .*0 means that nobody knows, or that no target",
        ),
        (asked("x", kept=0), "^x: something must survive, got none of 3 entries"),
    ):
        with pytest.raises(ValueError, match=message):
            bad.answer()


@pytest.mark.parametrize("late", (0, 1))
def test_the_loss_is_that_of_the_step_although_it_is_answered_late(late: int):
    """What is added to the sum after a step is of the next one."""
    loss, checks = Loss(lambda outputs, targets: outputs), LateChecks(late)
    weight = torch.ones(1, requires_grad=True)

    def step(number: int, by: float) -> None:
        loss(nn.Identity(), (weight.sum() * by, None))
        numbers = {"loss": loss.total, "scores": torch.ones(2), "kept": torch.tensor([1]), "before": None}
        sizes, nonfinite = {"a": 1}, torch.tensor([0])
        checks.add(StepCheck(f"step {number}", sizes, nonfinite, None, zero_means=None, **numbers))

    step(1, 1.0)
    with pytest.raises(ValueError, match="^step 2: the loss must be finite, got inf"):
        step(2, torch.inf)
        step(3, 1.0)


# ---- batches that end


@pytest.mark.parametrize("method", TRAINING)
@pytest.mark.parametrize("count", (0, 1, 4))
def test_batches_that_cannot_be_started_again(method: str, count: int):
    """They train one round, and are used up for the scores and for the rounds after it."""
    again = f"they ran out after {count} and cannot be started again" if count else "they are empty"
    options = {"method": method, "iterations": 3, "sparsity": 0.8}
    refused(f"batches must go on as long as the method needs them: {again}", iter(batches(count)), **options)
    if not count:
        refused("they are empty", [], **options)


def test_passes_count_what_all_who_take_have_been_given():
    passes = Passes(iter(range(5)))
    one, two = iter(passes), iter(passes)
    assert [next(one), next(two), next(one)] == [0, 1, 2]
    assert list(two) == [3, 4] and list(one) == []
    with pytest.raises(ValueError, match="they ran out after 5"):
        list(passes)
    twice = Passes("ab")
    assert list(twice) + list(twice) == ["a", "b"] * 2


def count_steps(data: Any, **options: Any) -> int:
    taken = []
    hook = register_optimizer_step_post_hook(lambda *_: taken.append(1))
    try:
        prune(network(), data, **{"iterations": 3, "sparsity": 0.8, **options})
    finally:
        hook.remove()
    return len(taken)


def stream() -> Iterator[tuple[Tensor, Tensor]]:
    return (batch for batch in itertools.cycle(batches()))


@pytest.mark.parametrize(("method", "rounds"), (("gradual", 3), ("imp", 3), ("rigl", 2)))
@pytest.mark.parametrize("make", (batches, stream, lambda: itertools.cycle(batches())))
def test_round_steps(method: str, rounds: int, make: Any):
    assert count_steps(make(), method=method, round_steps=7) == 7 * rounds
    assert count_steps(batches(), method=method) == 4 * rounds, "a pass"


def test_a_round_goes_on_where_the_last_one_stopped():
    seen: list[int] = []

    def compute(model: nn.Module, number: int) -> Tensor:
        seen.append(number)
        return model(torch.full((2, 3), float(number))).square().mean()

    train = sgd_round(Passes(range(5)), Loss(compute_loss=compute), steps=3)
    for number in range(3):
        train(nn.Linear(3, 2), None, number)
    assert seen == [0, 1, 2, 3, 4, 0, 1, 2, 3]


@pytest.mark.parametrize(
    "endless", (itertools.cycle(batches()), itertools.repeat(batches(1)[0]), itertools.cycle([]))
)
def test_batches_that_certainly_never_end(endless: Any):
    message = "prune: round_steps must be given for batches without an end, got None and (cycle|repeat|<iter)"
    for method in TRAINING:
        refused(message, endless, method=method)
    if not isinstance(endless, itertools.repeat):
        return
    prune(network(), endless, method="drive", iterations=3)
    prune(network(), endless, method="gradual", iterations=3, train=lambda *_: None)
    refused("they ran out after 3", itertools.repeat(batches(1)[0], 3), method="gradual", iterations=2)


def test_round_steps_that_go_with_nothing():
    for method in ("drive", "magnitude", methods.Snip()):
        refused(
            "round_steps must be None for a method that does not train, got 3",
            batches(),
            method=method,
            round_steps=3,
        )
    refused(
        "round_steps must be None where train says what a round is, got 3",
        batches(), method="imp", round_steps=3, train=lambda *_: None,
    )  # fmt: skip
    for bad in (0, -1, 1.5, True, "3"):
        refused("round_steps must be an integer >= 1, got ", batches(), method="imp", round_steps=bad)


# ---- nothing is left


@pytest.mark.parametrize(
    ("options", "left"),
    (
        ({"sparsity": 0.999}, "one of 160 entries"),
        ({"sparsity": 1 - 2**-53}, "one of 160 entries"),
        ({"sparsity": 0.999, "scope": "uniform"}, "one of 160 entries"),
        ({"sparsity": 0.999, "scope": "erk"}, "one of 160 entries"),
        ({"sparsity": 0.99, "structure": "2x2"}, "one of 40 blocks"),
        ({"sparsity": 0.9, "include": "4.bias"}, "one of 4 entries"),
        ({"sparsity": 0.999, "min_keep": 1}, "one of 160 entries"),
        ({"sparsity": 0.999, "schedule": "linear", "iterations": 9}, "one of 160 entries"),
    ),
)
def test_sparsities_that_round_to_everything(options: dict[str, Any], left: str):
    message = f"prune: sparsity must leave {left} at least, got {options['sparsity']}"
    refused(message, batches(), method="magnitude", **options)
    for method in TRAINING:
        refused(message, batches(), method=method, **options)


def test_the_last_one_may_stay():
    assert (
        sum(int(mask.sum()) for mask in prune(network(), [], method="magnitude", sparsity=159 / 160).values())
        == 1
    )


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (
            {"macs": 1e-6},
            "macs must leave 1 of 160 multiply-adds, what the cheapest entry costs, got 1e-06: 0",
        ),
        ({"macs": 0.01, "structure": "2x2"}, "macs must leave 4 of 160 .* cheapest block costs, got 0.01: 1"),
    ),
)
def test_budgets_that_leave_nothing(options: dict[str, Any], message: str):
    refused(message, batches(), method="magnitude", sparsity=None, **options)


def test_a_budget_less_than_what_ranks_first_costs():
    """A convolution's entry has 16 positions, the head's one: 8 are enough for the head alone."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten(), nn.Linear(32, 2, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(9)
        model[2].weight.fill_(0.1)
    data = [(torch.ones(3, 1, 4, 4), torch.zeros(3, dtype=torch.int64))]
    options = {"method": "magnitude", "sparsity": None, "macs": 0.084}  # of 96
    with pytest.raises(
        ValueError, match="prune: iteration 1: something must survive, got none of 66 entries"
    ):
        prune(model, data, alpha=0, **options)
    assert bool((model[0].weight == 9).all())
    assert sum(int(mask.sum()) for mask in prune(model, data, alpha=9, **options).values()) == 8


def test_fused_drive_prune_may_leave_nothing():
    """Its contract: exactly `round(sparsity * total)`, and `collapsed` says what became empty."""
    weight = torch.ones(3)
    result = drive.fused_drive_prune([weight], [torch.ones(3)], sparsity=0.9)
    assert result.kept == 0 and result.collapsed == ["0"] and not weight.any()
