"""drive.prune(structure="channels"): exact counts, ties, guards, budgets, and nothing changed on errors."""

from __future__ import annotations

import copy

import pytest
import torch
from structured_cases import groups_of
from torch import nn
from torch.nn import functional as F

import drive
from drive.targets.targets import prunable

pytest.importorskip("torch_pruning")


class Residual(nn.Module):
    """Two layers whose outputs are added up, a norm, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.outer = nn.Conv2d(6, 10, 1), nn.Conv2d(10, 6, 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        y = self.norm(self.stem(x))
        y = y + self.outer(F.relu(self.inner(y)))
        return self.fc(F.relu(y).mean((2, 3)))


def problem() -> tuple[Residual, list]:
    torch.manual_seed(0)
    return Residual(), [(torch.randn(8, 3, 6, 6), torch.arange(8) % 4)]


def prune(model, data, **options):
    return drive.prune(model, data, F.cross_entropy, structure="channels", progress=False, **options)


METHODS = ["drive", "snip", "grasp", "synflow", "crop", "magnitude", "random", "imp", "gradual", "rigl"]


@pytest.mark.parametrize("method", [*METHODS, "early_crop"])
@pytest.mark.parametrize("sparsity", [0.3, 0.71])
def test_every_method_leaves_an_exact_number_of_whole_units(method, sparsity):
    model, data = problem()
    masks = prune(model, data, method=method, sparsity=sparsity)
    rows = {name: mask.flatten(1).any(1) for name, mask in masks.items()}
    assert all(torch.equal(mask.flatten(1).all(1), rows[name]) for name, mask in masks.items())
    assert torch.equal(rows["stem.weight"], rows["outer.weight"])  # coupled by the sum
    assert int(rows["stem.weight"].sum() + rows["inner.weight"].sum()) == 16 - round(sparsity * 16)
    assert bool(masks["fc.weight"].all())
    weights = dict(model.named_parameters())
    assert all(bool((weights[name][~mask] == 0).all()) for name, mask in masks.items())


def test_units_compete_by_the_sum_of_the_scores_of_all_their_rows():
    model, data = problem()
    expected = copy.deepcopy(model)
    F.cross_entropy(expected(data[0][0]), data[0][1]).backward()
    scores = {
        name: (w * w.grad).double().abs().flatten(1).sum(1)
        for name, w in expected.named_parameters()
        if w.dim() > 1
    }
    shared = scores["stem.weight"] + scores["outer.weight"]
    every = torch.cat([shared, scores["inner.weight"]])
    best = every.argsort(descending=True)[:8]
    masks = prune(model, data, method="snip", sparsity=0.5)
    kept = torch.cat([masks["stem.weight"].flatten(1).any(1), masks["inner.weight"].flatten(1).any(1)])
    assert set(kept.nonzero().flatten().tolist()) == set(best.tolist())


def test_ties_are_broken_by_the_lower_name_and_index():
    model, data = problem()
    with torch.no_grad():
        for weight in prunable(model).values():
            weight.fill_(1)
    model.outer.weight.data.fill_(0)  # so that a unit of each group scores the same
    model.inner.weight.data.fill_(27 / 6)
    masks = prune(model, data, method="magnitude", sparsity=0.5)
    assert masks["stem.weight"].flatten(1).any(1).tolist() == [True] * 6
    assert masks["inner.weight"].flatten(1).any(1).tolist() == [True] * 2 + [False] * 8


def test_scores_of_zero_that_decide_are_an_error():
    model, data = problem()
    with torch.no_grad():
        model.inner.weight.zero_()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="all of inner"):
        prune(model, data, method="magnitude", sparsity=0.3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    masks = prune(model, data, method="magnitude", sparsity=0.3, on_ties="index")
    assert masks["inner.weight"].flatten(1).any(1).tolist() == [True] * 5 + [False] * 5


@pytest.mark.parametrize("min_keep", [1, 4])
def test_every_group_keeps_its_best_units(min_keep):
    model, data = problem()
    model.inner.weight.data.mul_(1e-6)
    best = model.inner.weight.detach().abs().flatten(1).sum(1).argsort(descending=True)[:min_keep]
    masks = prune(model, data, method="magnitude", sparsity=0.5, min_keep=min_keep)
    inner, stem = (masks[name].flatten(1).any(1) for name in ("inner.weight", "stem.weight"))
    expected = 8 - 6 if min_keep == 1 else min_keep
    assert int(inner.sum()) == expected and int(stem.sum()) == 8 - expected
    assert set(best.tolist()) <= set(inner.nonzero().flatten().tolist())


@pytest.mark.parametrize("macs", [0.5, 0.2, 0.12])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_budget_is_what_the_smaller_model_needs(macs, alpha):
    """Counted in the shrunken model, and the next unit would be too much."""
    model, data = problem()
    start = copy.deepcopy(model)
    masks = prune(model, data, method="snip", macs=macs, alpha=alpha)
    shrunk = drive.shrink(model, masks, data[0][0])
    fc = shrunk.model.fc.weight.numel()
    dense = 36 * (6 * 27 + 60 + 60) + 24
    stem, inner = shrunk.model.stem.out_channels, shrunk.model.inner.out_channels
    left = 36 * (27 * stem + 2 * stem * inner) + fc
    assert left == shrunk.after.multiply_adds and shrunk.before.multiply_adds == dense
    assert left <= macs * dense
    more = [  # with the unit that went last, of whichever group
        36 * (27 * (stem + 1) + 2 * (stem + 1) * inner) + 4 * (stem + 1),
        36 * (27 * stem + 2 * stem * (inner + 1)) + fc,
    ]
    assert max(more) > macs * dense
    again = prune(start, data, method="snip", macs=macs, alpha=alpha)
    assert all(torch.equal(again[name], mask) for name, mask in masks.items())


def test_uniform_scope_prunes_each_group_alike():
    model, data = problem()
    masks = prune(model, data, method="magnitude", sparsity=0.5, scope="uniform")
    assert int(masks["stem.weight"].flatten(1).any(1).sum()) == 3
    assert int(masks["inner.weight"].flatten(1).any(1).sum()) == 5


def test_pruning_goes_on_from_masks_of_whole_units():
    model, data = problem()
    first = prune(model, data, method="snip", sparsity=0.25)
    second = prune(model, data, method="snip", sparsity=0.5, masks=first)
    assert all(not bool((second[name] & ~mask).any()) for name, mask in first.items())
    first["inner.weight"][0, 0] = ~first["inner.weight"][0, 0]
    with pytest.raises(ValueError, match="must be of whole rows"):
        prune(model, data, method="snip", sparsity=0.6, masks=first)
    lone = drive.Masks.dense(model)
    lone["stem.weight"][0] = False
    with pytest.raises(ValueError, match="coupled with stem"):
        prune(model, data, method="snip", sparsity=0.6, masks=lone)


def test_what_is_excluded_keeps_its_whole_group():
    model, data = problem()
    masks = prune(model, data, method="snip", sparsity=0.5, exclude=["outer.weight"])
    assert bool(masks["stem.weight"].all())
    assert int(masks["inner.weight"].flatten(1).any(1).sum()) == 5
    whole = groups_of(model, data[0][0], exclude=["outer.weight"]).whole
    assert whole == {
        "stem": "weights that are not to be pruned",
        "outer": "weights that are not to be pruned",
        "fc": "outputs of the network",
    }


def test_iterations_steps_and_results():
    model, data = problem()
    seen = []
    prune(model, data, method="snip", sparsity=0.75, iterations=4, on_step=seen.append)
    assert len(seen) == 4
    assert seen[-1].ok and seen[-1].kept == sum(int(mask.sum()) for mask in seen[-1].masks.values())
    assert 0 < seen[0].threshold < 1 and seen[0].score_sum > 0


BAD = {
    "no such": ({"structure": "channel", "sparsity": 0.5}, "structure must be 'unstructured', 'channels'"),
    "scope": (
        {"sparsity": 0.5, "scope": "erk"},
        "scope must be 'global' or 'uniform' for structure 'channels'",
    ),
    "guard": ({"sparsity": 0.5, "min_keep": 0}, "min_keep must be an integer >= 1 for structure 'channels'"),
    "too many": ({"sparsity": 0.9, "min_keep": 3}, "min_keep=3 asks for 6 of 16 channels"),
    "macs": ({"macs": 0.01}, "macs must be at least 0.1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_one_line_and_change_nothing(name):
    options, message = BAD[name]
    model, data = problem()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        drive.prune(model, data, F.cross_entropy, **{"structure": "channels", **options})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_without_channels_and_one_that_is_wrapped_are_refused():
    _, data = problem()
    flat = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
    with pytest.raises(ValueError, match=r"no channels to prune in this model: outputs of the network: 1"):
        prune(flat, data, sparsity=0.5)
    with pytest.raises(ValueError, match="must not be wrapped or compiled yet, got DataParallel"):
        prune(nn.DataParallel(Residual()), data, sparsity=0.5)


def test_errors_in_the_loss_and_of_scores_leave_everything_as_it_was():
    model, data = problem()
    before = copy.deepcopy(model.state_dict())
    calls = 0

    def failing(outputs, targets):
        nonlocal calls
        calls += 1
        if calls > 6:
            raise RuntimeError("no more")
        return F.cross_entropy(outputs, targets)

    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no more"):
        drive.prune(model, data, failing, structure="channels", sparsity=0.5, method="drive", progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and model.training
    model.inner.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="iteration 1: the loss must be finite, got nan"):
        prune(model, data, sparsity=0.5, method="snip")
