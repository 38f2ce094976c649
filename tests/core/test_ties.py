"""Scores of 0 that decide: an error of drive.prune, one warning of fused_drive_prune, and no alarm else."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from worlds import returned, run

import drive
from drive import fused_drive_prune
from drive.methods.base import Method, Problem, Ranking

LOGGER = "drive._scoring.ties"
BATCH = [(torch.randn(16, 12, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 4)]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


def with_zero_head() -> nn.Sequential:
    """The head scores 0, as its weights are; all that is behind it, as no gradient comes through."""
    model = network()
    nn.init.zeros_(model[4].weight)
    return model


def prune(model: nn.Module, batches: Any = BATCH, **options: Any) -> drive.Masks:
    given = {"sparsity": 0.8, "method": "snip", "progress": False, **options}
    return drive.prune(model, batches, F.cross_entropy, **given)


@pytest.mark.parametrize(
    "options",
    (
        {},
        {"method": "drive", "iterations": 5},
        {"method": "drive", "iterations": 5, "schedule": "halving"},
        {"scope": "uniform"},
        {"scope": "erk"},
        {"structure": "2:4", "sparsity": 0.5},
        {"structure": "2x2"},
        {"min_keep": 1},
        {"min_keep": 3, "structure": "4x4"},
        {"sparsity": 0.001},
    ),
    ids=str,
)
def test_a_head_that_is_zero(options: dict[str, Any], caplog: pytest.LogCaptureFixture):
    model = with_zero_head()
    before = [parameter.clone() for parameter in model.parameters()]
    layers = (
        "all of 0.weight.*all of 2.weight.*all of 4.weight"
        if options.get("scope", "global") == "global"
        else "all of"
    )
    words = rf"prune: iteration 1: 100.0% of the entries score 0 \({layers}.*; 0 means that .*on_ties="
    with pytest.raises(ValueError, match=words):
        prune(model, **options)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert not [record for record in caplog.records if record.name == LOGGER]
    with caplog.at_level(logging.WARNING, LOGGER):
        masks = prune(model, on_ties="index", **options)
    said = [record.message for record in caplog.records if record.name == LOGGER]
    assert len(said) in (1, 2) and all("the lower index decides" in words for words in said)
    assert masks.sparsity() == pytest.approx(options.get("sparsity", 0.8), abs=0.02)


def test_gradient_flow_through_a_head_that_is_zero():
    """Its first iterations prune the head, which scores 0; from then on nothing flows."""
    with pytest.raises(
        ValueError,
        match=r"iteration 2: all of the entries score 0, .*0 means that the gradient flow does not change",
    ):
        prune(with_zero_head(), method="crop", iterations=3)


@dataclass
class Signed(Method):
    """Fixed scores of one layer: a third above 0, a third 0, a third below."""

    name = "signed"

    def rank(self, problem: Problem) -> Ranking:
        scores = {
            n: torch.arange(w.numel()).view_as(w).sub(w.numel() // 2) for n, w in problem.weights.items()
        }
        return Ranking(
            scores={n: s.div(16, rounding_mode="trunc").double() for n, s in scores.items()}, signed=True
        )


@pytest.mark.parametrize("structure", ("unstructured", "1x2"))
def test_scores_with_signs(structure: str):
    """Of 48 scores from -1.5 to 1.44, 31 or 32 are 0: the index decides between 17 % and 83 %."""
    options = {"method": Signed(), "structure": structure}
    for sparsity in (0.1, 0.9):
        prune(nn.Sequential(nn.Linear(12, 4)), sparsity=sparsity, **options)
    for sparsity in (0.25, 0.5, 0.75):
        with pytest.raises(ValueError, match=r"6\d.\d% of the entries score 0 \(6\d.\d% of 0.weight\)"):
            prune(nn.Sequential(nn.Linear(12, 4)), sparsity=sparsity, **options)


def test_the_message_names_some_layers_and_counts_the_rest():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(12, 12) for _ in range(9)], nn.Linear(12, 4))
    nn.init.zeros_(model[9].weight)
    with pytest.raises(ValueError, match=r"all of 0.weight, .*, all of 4.weight and 5 more\), so that not"):
        prune(model)


def test_a_part_that_is_more_than_is_pruned():
    """Half of the inputs are always 0: at 40 % the index decides, at 60 % the scores do."""
    x = BATCH[0][0].clone()
    x[:, ::2] = 0
    model = nn.Sequential(nn.Linear(12, 4))
    with pytest.raises(ValueError, match=r"50.0% of the entries score 0 \(50.0% of 0.weight\)"):
        prune(model, [(x, BATCH[0][1])], sparsity=0.4)
    masks = prune(model, [(x, BATCH[0][1])], sparsity=0.6)
    assert not masks["0.weight"][:, ::2].any()


def test_no_alarm_where_all_of_them_go_in_the_end(caplog: pytest.LogCaptureFixture):
    """In the first of ten iterations there are more zeros than it prunes."""
    x = BATCH[0][0].clone()
    x[:, ::2] = 0
    model = network()
    with caplog.at_level(logging.INFO, LOGGER):
        masks = prune(model, [(x, BATCH[0][1])], method="drive", iterations=10, sparsity=0.6)
    assert not masks["0.weight"][:, ::2].any()
    assert [r.levelname for r in caplog.records if r.name == LOGGER] == ["INFO"]
    assert "no more than are pruned in the end" in caplog.text


def test_no_alarm_without_zeros_that_decide():
    for options in ({}, {"sparsity": 0.0}, {"structure": "2:4", "sparsity": 0.5}, {"method": "grasp"}):
        prune(network(), **options)
    model = with_zero_head()
    prune(model, exclude=["0.*", "2.*"], method="random")
    masks = prune(network(), method="magnitude", sparsity=0.5)  # a network that has zeros already
    model = network()
    masks.apply_(model)
    prune(model, masks=masks, method="magnitude", sparsity=0.5, iterations=3)
    prune(model, method="magnitude", sparsity=0.6)  # those that are 0 go first, and then more
    with pytest.raises(ValueError, match="of the entries score 0"):
        prune(model, method="magnitude", sparsity=0.4)


def test_what_min_keep_asks_for_may_score_zero():
    """A layer that is dead: its guards stay, whatever they score."""
    model = network()
    with torch.no_grad():
        model[2].weight.zero_()
    masks = prune(model, method="magnitude", sparsity=0.9, min_keep=5)
    assert masks["2.weight"].sum() == 5


def test_scores_that_float32_makes_zero():
    """1e-30 * 1e-30: what the op ranks by is 0, and what counts is that."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1e-30)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum() * 1e-30

    batches = [(torch.ones(1, 8), torch.zeros(1))]
    with pytest.raises(ValueError, match="100.0% of the entries score 0"):
        drive.prune(model, batches, loss, method="drive", iterations=1, sparsity=0.5, progress=False)
    drive.prune(model.double(), batches_of_double(batches), loss, method="snip", sparsity=0.5, progress=False)


def batches_of_double(batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(x.double(), y) for x, y in batches]


class Late(Method):
    """Of 48 entries, no score is 0 at first; at last a fourth of them are."""

    name = "late"

    def rank(self, problem: Problem) -> Ranking:
        scores = {name: torch.arange(48.0).view_as(w) + 1 for name, w in problem.weights.items()}
        if problem.iteration == problem.iterations:
            scores = {name: score * (score <= 36) for name, score in scores.items()}
        return Ranking(scores=scores)


def test_a_batch_in_which_some_units_are_dead(caplog: pytest.LogCaptureFixture):
    """At the end the index may choose a few of them: in words, but no error after a long run."""
    with caplog.at_level(logging.WARNING, LOGGER):
        masks = prune(
            nn.Sequential(nn.Linear(12, 4)), method=Late(), iterations=5, schedule="linear", sparsity=0.5
        )
    (record,) = [record for record in caplog.records if record.name == LOGGER]
    assert (
        "prune: iteration 5: 41.4% of the entries score 0 (41.4% of 0.weight), so that not" in record.message
    )
    assert masks.sparsity() == 0.5


def test_a_bad_argument():
    with pytest.raises(ValueError, match="on_ties must be 'error' or 'index', got 'first'"):
        prune(network(), on_ties="first")


def test_the_step_warns_once_a_model(caplog: pytest.LogCaptureFixture):
    def scored(model: nn.Module) -> nn.Module:
        F.cross_entropy(model(BATCH[0][0]), BATCH[0][1]).backward()
        return model

    model = scored(with_zero_head())
    with caplog.at_level(logging.WARNING, LOGGER):
        fused_drive_prune(scored(network()), sparsity=0.9)
        fused_drive_prune(model, sparsity=0.0)
        fused_drive_prune(model, sparsity=0.3, check_finite=False)
        assert not caplog.records
        masks = fused_drive_prune(model, sparsity=0.5).masks
        fused_drive_prune(model, sparsity=0.6, masks=masks)
        assert [r.message for r in caplog.records if "lower index has decided" in r.message] == [
            caplog.records[0].message
        ]
        fused_drive_prune(scored(with_zero_head()), sparsity=0.5)
        assert len(caplog.records) == 2


def on_ranks() -> None:
    """As copies: all ranks raise, none waits; weights stay."""
    model = DistributedDataParallel(with_zero_head())
    with pytest.raises(ValueError, match="iteration 1: 100.0% of the entries score 0"):
        prune(model)
    prune(DistributedDataParallel(network()))


def test_copies():
    returned(run(2, on_ranks))


def sharded() -> None:
    from torch.distributed.fsdp import fully_shard

    model = with_zero_head()
    for layer in (model[0], model[2], model[4], model):
        fully_shard(layer)
    with pytest.raises(ValueError, match="iteration 1: 100.0% of the entries score 0"):
        prune(model)
    x = BATCH[0][0].clone()
    x[:, ::2] = 0
    one = fully_shard(nn.Sequential(nn.Linear(12, 4)))
    with pytest.raises(ValueError, match=r"50.0% of the entries score 0 \(50.0% of 0.weight\)"):
        prune(one, [(x, BATCH[0][1])], sparsity=0.4)


def test_shards():
    returned(run(2, sharded))
