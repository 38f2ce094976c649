"""How ways to compute are timed, and which of them is taken."""

from __future__ import annotations

import math
import random
from functools import partial
from importlib import import_module

import pytest
import torch
from torch import nn

from drive.sparse import measure
from drive.sparse.convert import CHAINS, _choose, _fastest

convert_module = import_module("drive.sparse.convert")  # drive.sparse.convert is the function
LAST = measure.CHANNELS_LAST


@pytest.mark.parametrize(("sparse", "chosen"), ((0.98, "dense channels_last"), (0.96, "sparse blocked")))
def test_nearly_even_stays_dense(sparse: float, chosen: str, monkeypatch: pytest.MonkeyPatch):
    seconds = {"dense": 1.1, "dense channels_last": 1.0, "sparse": 1.2, "sparse blocked": sparse}
    monkeypatch.setattr(measure, "layer_times", lambda *_: seconds)
    layer, shape = nn.Conv2d(4, 4, 3), torch.Size((1, 4, 9, 9))
    mask = torch.ones_like(layer.weight, dtype=torch.bool)
    choice, found = _choose("conv", layer, mask, shape, measure.Costs(False, training=False))
    assert (choice.chosen, found is not None) == (chosen, sparse < 0.97)


@pytest.mark.parametrize(
    ("measured", "chosen"),
    (
        ([{"dense": 1.0, CHAINS: 0.5}], CHAINS),
        ([{"dense": 1.0, CHAINS: 0.9}, {"dense": 2.0, CHAINS: 1.9}], CHAINS),
        ([{"dense": 1.0, CHAINS: 0.9}, {"dense": 2.0, CHAINS: 1.96}], "dense"),
        ([{"dense": 1.0, CHAINS: 0.98}], "dense"),
        ([{"dense": 1.0, LAST: 0.7, CHAINS: 0.69}], LAST),
        ([{"dense": 1.0, LAST: 0.99}, {"dense": 1.0, LAST: 0.98}], LAST),
        ([{"dense": 1.0, LAST: 0.9}, {"dense": 1.0, LAST: 1.02}], "dense"),
        ([{"dense": 1.0, LAST: 0.7, CHAINS: 0.6}, {LAST: 1.0, CHAINS: 0.98}], LAST),
        ([{"dense": 1.0, LAST: 0.9, CHAINS: 0.85}, {"dense": 1.0, LAST: 1.1}, {"dense": 1.0, CHAINS: 0.9}],
         CHAINS),
    ),
)  # fmt: skip
def test_a_narrow_lead_has_to_show_again(
    measured: list[dict[str, float]], chosen: str, monkeypatch: pytest.MonkeyPatch
):
    ahead = iter(measured)

    def times(ways: dict[str, nn.Module], *_: object) -> dict[str, float]:
        found = next(ahead)
        assert ways.keys() == found.keys()
        return dict(found)

    monkeypatch.setattr(convert_module, "model_times", times)
    way, whole = _fastest(dict.fromkeys(measured[0], nn.Identity()), (), False)
    assert way == chosen
    assert whole.keys() == measured[0].keys()
    assert next(ahead, None) is None


def test_layers_alike_are_measured_once(monkeypatch: pytest.MonkeyPatch):
    measured = []
    monkeypatch.setattr(measure, "layer_times", lambda *given: measured.append(given) or {"dense": 1.0})
    costs, shape = measure.Costs(False, training=False), torch.Size((1, 4, 9, 9))
    for layer, density in (
        (nn.Conv2d(4, 4, 3), 0.1), (nn.Conv2d(4, 4, 3), 0.101), (nn.Conv2d(4, 4, 3), 0.2),
        (nn.Conv2d(4, 4, 3, stride=2), 0.1), (nn.Conv2d(4, 4, 3, bias=False), 0.1),
        (nn.Conv2d(4, 4, 3).double(), 0.1), (nn.Conv2d(4, 4, 3), 0.0),
    ):  # fmt: skip
        costs.of(layer, {}, shape, density)
    assert len(measured) == 6


def test_interleaved_calls_all_in_each_turn_in_orders_of_their_own():
    called: list[str] = []
    rng = torch.random.get_rng_state(), random.getstate()
    runs = {name: partial(called.append, name) for name in "abcd"}
    found = measure.interleaved(runs, seconds=math.inf)
    assert list(found) == list(runs) and min(found.values()) > 0
    timed = called[len(runs) :: 2]  # short calls: all once, then each twice a turn, the second one timed
    turns = [tuple(timed[i : i + 4]) for i in range(0, len(timed), 4)]
    assert len(turns) == 15 and all(set(turn) == set(runs) for turn in turns)
    assert len(set(turns)) > 5
    assert torch.equal(torch.random.get_rng_state(), rng[0]) and random.getstate() == rng[1]
    called.clear()
    measure.interleaved(runs, seconds=0.0)
    assert len(called) == len(runs) * (1 + 2 * 5)
