"""Scopes and structures: exact counts, and which entries they are."""

from __future__ import annotations

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import drive
from drive import methods, scopes
from drive.structures import Blocks, NofM

LOSS = nn.functional.cross_entropy


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2), nn.Flatten(), nn.Linear(100, 4),
    )  # fmt: skip


DATA = [(torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 4)]
INPUT_AXIS = {"0.weight": 1, "2.weight": 1, "4.weight": 0, "6.weight": 1}
QUICK = [name for name in methods.names() if methods.get(name).stage != "training"]


def prune(model: nn.Module, **options):
    return drive.prune(model, DATA, LOSS, **{"progress": False, "min_keep": 0, **options})


def grouped(tensor: torch.Tensor, axis: int, m: int) -> torch.Tensor:
    return tensor.movedim(axis, -1).unflatten(-1, (-1, m))


@given(
    scope=st.sampled_from(scopes.names()), method=st.sampled_from(QUICK), sparsity=st.floats(0, 0.99),
    iterations=st.integers(1, 3), min_keep=st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_exact_count_in_every_scope(scope, method, sparsity, iterations, min_keep):
    model = network()
    total = 288 + 288 + 128 + 400
    masks = prune(
        model, method=method, sparsity=sparsity, scope=scope, iterations=iterations,
        min_keep=min_keep if scope == "global" and sparsity < 0.9 else 0,
    )  # fmt: skip
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(sparsity * total)
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)


@given(
    n=st.integers(1, 3), method=st.sampled_from(QUICK), scope=st.sampled_from(("global", "uniform")),
    iterations=st.integers(1, 4),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_n_of_four_everywhere(n, method, scope, iterations):
    model = network()
    masks = prune(
        model, method=method, sparsity=1 - n / 4, structure=f"{n}:4", scope=scope, iterations=iterations
    )
    for name, mask in masks.items():
        assert (grouped(mask, INPUT_AXIS[name], 4).sum(-1) == n).all(), name
        assert torch.equal(model.get_parameter(name) != 0, mask)


def test_two_of_four_are_the_two_largest():
    """Equal ones: the first."""
    model = network()
    with torch.no_grad():
        model[6].weight[0, :4] = torch.tensor([1.0, -2.0, 1.0, 1.0])
        model[6].weight[1, :4] = 1.0
    weights = {name: w.detach().abs().clone() for name, w in model.named_parameters() if w.dim() > 1}
    masks = prune(model, method="magnitude", sparsity=0.5, structure="2:4")
    for name, mask in masks.items():
        kept, score = grouped(mask, INPUT_AXIS[name], 4), grouped(weights[name], INPUT_AXIS[name], 4)
        assert (score.masked_fill(~kept, torch.inf).amin(-1) >= score.masked_fill(kept, 0).amax(-1)).all()
    assert masks["6.weight"][:2, :4].tolist() == [[True, True, False, False], [True, True, False, False]]


def test_two_of_four_on_the_way_prunes_the_weakest_that_can_be_spared():
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.5, 0.6, 0.7, 9.0]]))
    half = lambda step: (0.25, 0.5)[step - 1]  # noqa: E731
    seen = []

    class Watched(methods.Magnitude):
        def rank(self, problem):
            seen.append(problem.model[0].weight.detach().clone())
            return super().rank(problem)

    drive.prune(
        model, [], LOSS, method=Watched(), sparsity=0.5, structure="2:4", iterations=2, schedule=half,
        progress=False,
    )  # fmt: skip
    assert (seen[1] != 0).tolist() == [[True] * 4, [False, False, True, True]]
    assert (model[0].weight != 0).tolist() == [[False, False, True, True], [False, False, True, True]]


@pytest.mark.parametrize("method", ("drive", "grasp", "magnitude", "crop"))
@pytest.mark.parametrize("size", ((2, 2), (4, 1), (1, 4)))
def test_blocks_are_those_of_the_largest_summed_score(method: str, size: tuple[int, int]):
    model, rows, columns = network(), *size
    reference = copy.deepcopy(model)
    found = {}

    class Watched(type(methods.get(method))):
        def rank(self, problem):
            ranking = super().rank(problem)
            for name, w in problem.weights.items():
                if ranking.scores is not None:
                    found[name] = ranking.scores[name].detach().double().clone()
                elif ranking.gradients is not None:
                    found[name] = (w * ranking.gradients[name]).detach().double().abs()
                else:
                    found[name] = w.detach().double().abs()
            return ranking

    options = {"sparsity": 0.6, "structure": f"{rows}x{columns}", "iterations": 1}
    masks = prune(model, method=Watched(), **options)
    if method == "drive":
        found = {name: score**2 for name, score in found.items()}
    sums, kept = [], []
    for name, mask in masks.items():
        blocks = mask.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        whole = blocks.sum((1, 3))
        assert ((whole == 0) | (whole == rows * columns)).all()
        kept.append((whole > 0).flatten())
        sums.append(found[name].unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).sum((1, 3)).flatten())
        assert torch.equal(model.get_parameter(name), reference.get_parameter(name) * mask)
    sums, kept = torch.cat(sums), torch.cat(kept)
    assert int((~kept).sum()) == round(0.6 * kept.numel())
    slack = 1e-6 * sums.abs().max() if method == "grasp" else 1e-6 * sums[kept].min()  # float32 sums
    assert sums[kept].min() >= sums[~kept].max() - slack


@pytest.mark.parametrize("scope", scopes.names())
def test_blocks_count_exactly_and_stay_pruned(scope: str):
    model = network()
    first = prune(model, method="drive", sparsity=0.3, structure="4x4", scope=scope, iterations=2)
    second = prune(model, sparsity=0.8, structure="4x4", scope=scope, iterations=3, masks=first)
    blocks = (288 + 288 + 128 + 400) // 16
    assert sum(int((~m).sum()) for m in second.values()) == 16 * round(0.8 * blocks)
    assert not any((second[name] & ~first[name]).any() for name in first)


def test_min_keep_in_blocks():
    masks = prune(network(), method="snip", sparsity=0.9, structure="2x2", min_keep=5)
    assert all(int(mask.sum()) >= 8 for mask in masks.values()), "two blocks of four hold five"


def test_erk_densities():
    weights = {"a": torch.ones(10, 20), "b": torch.ones(40, 10, 3, 3), "c": torch.ones(2, 2)}
    plan = {names[0]: prune for names, prune in scopes.groups("erk", weights, 3500)}
    assert sum(plan.values()) == 3500 and plan["c"] == 0, "a small layer stays dense"
    density = {name: 1 - plan[name] / weights[name].numel() for name in "ab"}
    raw = {"a": 30 / 200, "b": 56 / 3600}
    assert density["a"] / density["b"] == pytest.approx(raw["a"] / raw["b"], rel=0.02)


def test_uniform_sparsity():
    masks = prune(network(), method="snip", sparsity=0.75, scope="uniform")
    assert [mask.numel() - int(mask.sum()) for mask in masks.values()] == [216, 216, 96, 300]


def test_a_non_finite_score_changes_nothing():
    model = network()
    with torch.no_grad():
        model[6].weight[0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    for structure, sparsity in (("2:4", 0.5), ("4x4", 0.7)):
        with pytest.raises(ValueError, match=r"non-finite score in 6.weight \(1 of 400 entries\)"):
            prune(model, method="magnitude", sparsity=sparsity, structure=structure)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


ODD = nn.Sequential(nn.Linear(6, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"structure": "2:4", "sparsity": 0.9}, "sparsity must be 0.5 for structure 2:4, got 0.9"),
        ({"structure": "2:4", "sparsity": 0.5, "model": ODD}, r"inputs in groups of 4 .*\(4, 6\)"),
        ({"structure": "4x4", "model": ODD}, r"0.weight must have a shape of whole blocks .* got \(4, 6\)"),
        ({"structure": "2:4", "sparsity": 0.5, "scope": "erk"}, "scope must be global or uniform"),
        ({"structure": "2:4", "sparsity": 0.5, "min_keep": 100}, "must be at most 64, what 4.weight"),
        ({"structure": "4:2"}, "structure must be 'unstructured', 'N:M' .* got '4:2'"),
        ({"structure": "1x1"}, "structure must be .* got '1x1'"),
        ({"structure": "channels"}, "structure must be .* got 'channels'"),
    ),
)  # fmt: skip
def test_what_cannot_be(options, message: str):
    options = {"sparsity": 0.6, **options}
    model = copy.deepcopy(options.pop("model", network()))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        prune(model, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_masks_that_have_gone_too_far():
    model = network()
    masks = prune(copy.deepcopy(model), method="snip", sparsity=0.6)
    for structure, sparsity, message in (
        ("2:4", 0.5, "must leave 2 of every 4"),
        ("2x2", 0.9, "whole blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            prune(model, structure=structure, sparsity=sparsity, masks=masks)


def test_names():
    assert drive.structures.structure("2:4") == NofM(2, 4) and drive.structures.structure("8x1") == Blocks(
        8, 1
    )
    assert drive.structures.structure("unstructured") is None
