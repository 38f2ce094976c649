"""Methods that train: what IMP resets, RigL grows, EarlyCroP waits for; a failed training is undone."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import drive
from drive import methods, schedules
from drive._scoring.feed import Passes
from drive._scoring.loss import Loss
from drive._scoring.sgd import sgd_round
from drive.methods.early_crop import distance, settled

LOSS = nn.functional.cross_entropy


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(216, 10)
    )


def batches(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 1, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator))
        for _ in range(count)
    ]


def prune(model: nn.Module, **options):
    return drive.prune(model, batches(), LOSS, **{"sparsity": 0.9, "progress": False, **options})


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Watch:
    """The default training, remembering what it was called with and what it left."""

    def __init__(self):
        self.train = sgd_round(Passes(batches()), Loss(LOSS), lr=0.1)
        self.numbers, self.masks, self.before, self.after = [], [], [], []

    def __call__(self, model, masks, number):
        self.numbers.append(number)
        self.masks.append(masks and {name: mask.clone() for name, mask in masks.items()})
        self.before.append(state(model))
        self.train(model, masks, number)
        self.after.append(state(model))


def test_imp_resets_survivors_to_the_initialisation_bit_for_bit():
    model, watch = network(), Watch()
    start = state(model)
    masks = prune(model, method=methods.Imp(fraction=0.5), train=watch)
    assert len(watch.numbers) == 4 and set(watch.numbers) == {0}, "0.5^4 < 0.1 < 0.5^3"
    for before in [*watch.before, state(model)]:
        for name, tensor in before.items():
            alive = tensor != 0 if name in masks else torch.ones_like(tensor, dtype=torch.bool)
            assert torch.equal(tensor[alive], start[name][alive]), name
    for level, survivors in enumerate(watch.masks[1:], 1):
        kept = sum(int(mask.sum()) for mask in survivors.values())
        assert kept == 2214 - round((1 - 0.1 ** (level / 4)) * 2214)
    last = torch.cat([watch.after[-1][name].abs().flatten() for name in masks])
    flat = torch.cat([mask.flatten() for mask in masks.values()])
    assert last[flat].min() >= last[~flat].max(), "by the trained weights of the last level"


def test_imp_rewinds_to_a_later_round():
    model, watch = network(), Watch()
    masks = prune(model, method=methods.Imp(fraction=0.7, rounds=3, rewind=1), train=watch)
    assert watch.numbers == [0, 1, 2, 1, 2]
    point = watch.after[0]
    for name, tensor in model.state_dict().items():
        expected = point[name] * masks[name] if name in masks else point[name]
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize(("sparsity", "levels"), ((0.0, 1), (0.2, 1), (0.36, 2), (0.9, 11), (0.98, 18)))
def test_imp_prunes_a_fifth_a_level(sparsity: float, levels: int):
    assert methods.Imp().iterations_to(sparsity) == levels


@pytest.mark.parametrize("scope", ("erk", "uniform"))
def test_rigl_keeps_layer_densities_and_grows_from_zero(scope: str):
    model, watch = network(), Watch()
    masks = prune(model, method="rigl", iterations=6, train=watch, scope=scope)
    steps = [*watch.masks, {name: mask.clone() for name, mask in masks.items()}]
    assert watch.numbers == [0, 1, 2, 3, 4]
    counts = [{name: int(mask.sum()) for name, mask in step.items()} for step in steps]
    assert all(count == counts[0] for count in counts)
    weights = [*watch.before[1:], state(model)]
    for step, (old, new) in enumerate(pairwise(steps), 1):
        for name in masks:
            trained, mask = watch.after[step - 1][name], old[name]
            alive = int(mask.sum())
            drop = int(0.3 / 2 * (1 + math.cos(math.pi * step / 6)) * alive)
            weakest = trained.abs().masked_fill(~mask, torch.inf).flatten().argsort()[:drop]
            dropped = torch.zeros(mask.numel(), dtype=torch.bool).index_fill(0, weakest, True).view_as(mask)
            gone, grown = mask & ~new[name], new[name] & ~mask
            assert not (gone & ~dropped).any(), "only the smallest weights are dropped"
            assert int(gone.sum()) == int(grown.sum()) <= drop
            assert (weights[step - 1][name][grown] == 0).all(), "grown weights start at zero"
            stay = mask & new[name]
            assert torch.equal(weights[step - 1][name][stay], trained[stay])


def test_rigl_grows_the_largest_gradients():
    model = network()
    seen = []

    class Watched(methods.RigL):
        def rank(self, problem):
            ranking = super().rank(problem)
            if ranking.revive:
                stay = {name: score == 2.0**200 for name, score in ranking.scores.items()}
                seen.append((stay, {name: score.clone() for name, score in ranking.scores.items()}))
            return ranking

    masks = prune(model, method=Watched(), iterations=2)
    ((stay, scores),) = seen
    for name, mask in masks.items():
        grown, rest = mask & ~stay[name], ~mask
        assert (mask | ~stay[name]).all(), "what stays, stays"
        assert grown.any() and scores[name][grown].min() >= scores[name][rest].max()


def test_gradual_follows_the_cubic_schedule():
    watch = Watch()
    prune(network(), method="gradual", iterations=5, train=watch)
    assert watch.numbers == [0, 1, 2, 3, 4] and watch.masks[0] is None
    plan = schedules.plan("cubic", 0.9, 5)
    pruned = [sum(int((~mask).sum()) for mask in masks.values()) for masks in watch.masks[1:]]
    assert pruned == [round(step * 2214) for step in plan[:-1]]


class Moves:
    """A training after which the distance to the first round's weights is as planned."""

    def __init__(self, *distances: float):
        self.distances, self.calls = distances, 0

    @torch.no_grad()
    def __call__(self, model, masks, number):
        assert number == self.calls
        if number == 0:
            self.reference = [w.clone() for w in model.parameters()]
        else:
            for w, start in zip(model.parameters(), self.reference, strict=True):
                w.copy_(start * (1 + self.distances[number - 1]))
        self.calls += 1


@pytest.mark.parametrize(
    ("sparsity", "rounds"),
    (
        (0.5, 4),  # 0.1 < 0.5 * 0.4
        (0.8, 5),  # 0.05 < 0.2 * 0.4
        (0.99, 7),  # never below 0.004: the latest round
    ),
)
def test_early_crop_waits_for_the_weights_to_settle(sparsity: float, rounds: int):
    """d_2 = 0.4; the next ones differ by 0.3, 0.1, 0.05, 0.05, 0.05."""
    moves = Moves(0.4, 0.7, 0.8, 0.85, 0.9, 0.95)
    drive.prune(
        network().double(), [(x.double(), y) for x, y in batches()], LOSS, sparsity=sparsity, iterations=2,
        method=methods.EarlyCrop(latest=7), train=moves, progress=False,
    )  # fmt: skip
    assert moves.calls == rounds


@pytest.mark.parametrize(
    ("sparsity", "floor", "rounds"),
    (
        (0.5, 0.01, 4),  # 0.1 < 0.4 * 0.4
        (0.88, 0.01, 7),  # never below 0.02 * 0.4
        (0.88, 0.2, 5),  # 0.05 < 0.2 * 0.4
        (0.95, 0.01, 7),
        (0.95, 0.13, 5),  # 0.05 < 0.13 * 0.4, where the published rule never fires
    ),
)
def test_early_crop_for_channels_has_a_floor(sparsity: float, floor: float, rounds: int):
    pytest.importorskip("torch_pruning")
    moves = Moves(0.4, 0.7, 0.8, 0.85, 0.9, 0.95)
    model = nn.Sequential(nn.Conv2d(1, 20, 3), nn.ReLU(), nn.Flatten(), nn.Linear(720, 10))
    drive.prune(
        model.double(), [(x.double(), y) for x, y in batches()], LOSS, sparsity=sparsity,
        structure="channels", method=methods.EarlyCrop(latest=7, floor=floor), train=moves, progress=False,
    )  # fmt: skip
    assert moves.calls == rounds


def test_distance_and_rule():
    one, two = (
        [torch.tensor([3.0, 0.0]), torch.tensor([4.0])],
        [torch.tensor([3.0, 5.0]), torch.tensor([4.0])],
    )
    assert distance(two, one) == pytest.approx(1.0)
    assert not settled([0.4], 0.5)
    assert settled([0.4, 0.55], 0.5) and not settled([0.4, 0.61], 0.5)


TRAINING = [name for name in methods.names() if methods.get(name).stage == "training"]


@pytest.mark.parametrize("error", (KeyboardInterrupt(), RuntimeError("no more memory")))
@pytest.mark.parametrize("method", TRAINING)
def test_a_failed_training_is_undone(method: str, error: BaseException):
    model = network()
    model[1].eval()
    model[5].weight.grad = torch.full_like(model[5].weight, 7)
    before, rng, modes = state(model), torch.get_rng_state(), [m.training for m in model.modules()]
    done = Watch()

    def train(model, masks, number):
        done(model, masks, number)
        if len(done.numbers) == 2:
            raise error

    with pytest.raises(type(error)):
        prune(model, method=method, train=train, iterations=4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model.modules()] == modes
    assert (model[5].weight.grad == 7).all() and model[0].weight.grad is None


@pytest.mark.parametrize("method", ("rigl", "early_crop"))
def test_ranking_leaves_batch_statistics_alone(method: str):
    """The statistics are those of the training alone."""
    model, watch = network(), Watch()
    prune(model, method=method, train=watch, iterations=3)
    assert torch.equal(model[1].running_mean, watch.after[-1]["1.running_mean"])


def test_the_default_round_is_an_epoch():
    seen = []

    def loss(outputs, targets):
        seen.append(targets)
        return LOSS(outputs, targets)

    drive.prune(network(), batches(3), loss, method="gradual", sparsity=0.5, iterations=2, progress=False)
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda: methods.Imp(fraction=1.0), r"Imp: fraction must be in \(0, 1\), got 1.0"),
        (lambda: methods.Imp(rounds=2, rewind=2), r"Imp: rewind must be in \[0, rounds\), got 2 of 2"),
        (lambda: methods.RigL(fraction=-1), r"RigL: fraction must be in \[0, 1\], got -1"),
        (lambda: methods.EarlyCrop(latest=0), "EarlyCrop: latest must be an integer >= 1, got 0"),
        (lambda: prune(network(), accumulate=0), "prune: accumulate must be an integer >= 1, got 0"),
    ),
)
def test_bad_arguments(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()
