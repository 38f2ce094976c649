"""`drive.prune` to a share of the multiply-adds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import drive
from drive.targets.multiply_adds import dense_work, multiply_adds, work
from drive.targets.targets import prunable

BATCH = 6


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1),
        nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 25, 10),
    )  # fmt: skip


def batches(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(BATCH, 3, 12, 12, generator=generator), torch.randint(10, (BATCH,), generator=generator))
        for _ in range(count)
    ]


def costs_of(model: nn.Module) -> dict[str, int]:
    return multiply_adds(model, prunable(model), lambda: model(batches(1)[0][0]), BATCH, op="test")


def pruned(model: nn.Module, **options) -> drive.Masks:
    loss_fn = nn.functional.cross_entropy
    return drive.prune(model, batches(), loss_fn, progress=False, **options)


@pytest.mark.parametrize("method", ("drive", "snip", "grasp", "synflow", "magnitude", "early_crop"))
@pytest.mark.parametrize("alpha", (None, 0.0, 1.5))
def test_share_is_left(method: str, alpha: float | None):
    model = network()
    costs = costs_of(network())
    assert costs == {"0.weight": 144, "4.weight": 25, "7.weight": 1}
    dense = dense_work(costs, prunable(model))
    ties = "index" if method == "synflow" else "error"  # by score alone, it cuts off the first layer here
    masks = pruned(model, method=method, macs=0.2, alpha=alpha, iterations=3, on_ties=ties)
    left = work(costs, {name: int(mask.sum()) for name, mask in masks.items()})
    assert dense // 5 - max(costs.values()) < left <= dense // 5
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].any()


def test_steps_follow_the_schedule():
    model, shares = network(), []
    costs = costs_of(network())
    dense = dense_work(costs, prunable(model))

    def note(result: drive.PruneResult) -> None:
        kept = {name: int(mask.sum()) for name, mask in result.masks.items()}
        shares.append(work(costs, kept) / dense)

    pruned(model, macs=0.1, iterations=4, schedule="linear", on_step=note)
    assert shares == pytest.approx([0.775, 0.55, 0.325, 0.1], abs=max(costs.values()) / dense)


def test_equal_costs_are_counts():
    def mlp() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(432, 20), nn.ReLU(), nn.Linear(20, 10))

    ours, theirs = mlp(), mlp()
    by_work = pruned(ours, macs=0.125, iterations=5, alpha=1.0)
    by_count = pruned(theirs, sparsity=0.875, iterations=5)
    assert all(torch.equal(mask, by_count[name]) for name, mask in by_work.items())


def test_alpha_keeps_more_entries():
    kept = [sum(int(m.sum()) for m in pruned(network(), macs=0.1, alpha=a).values()) for a in (0.0, 1.0)]
    assert kept[1] > kept[0]


def test_leaves_alone_what_scoring_does():
    model = network()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    pruned(model, macs=0.3, iterations=2)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)


def test_an_iterator_gives_its_first_batch_to_both():
    def stream() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield from batches(3)

    model = network()
    masks = drive.prune(model, stream(), nn.functional.cross_entropy, macs=0.3, iterations=3, progress=False)
    again = network()
    expected = pruned(again, macs=0.3, iterations=3)
    assert all(torch.equal(mask, expected[name]) for name, mask in masks.items())


def test_min_keep_counts():
    model = network()
    masks = pruned(model, macs=0.1, iterations=3, min_keep=30)
    assert all(int(mask.sum()) >= 30 for mask in masks.values())
    costs = costs_of(network())
    left = work(costs, {name: int(mask.sum()) for name, mask in masks.items()})
    assert left <= dense_work(costs, prunable(model)) // 10


@pytest.mark.parametrize("method", ("drive", "grasp", "magnitude"))
@pytest.mark.parametrize("min_keep", (0, 9))
def test_blocks(method: str, min_keep: int):
    """Of one tensor each: the best ones by the sum of their scores / cost ** alpha, as long as they fit."""

    def convolutions() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.Flatten(),
            nn.Linear(16 * 25, 12),
        )  # fmt: skip

    images, labels = torch.randn(BATCH, 4, 12, 12), torch.randint(10, (BATCH,))
    model, costs = convolutions(), {"0.weight": 144, "2.weight": 25, "4.weight": 1}
    masks = drive.prune(
        model, [(images, labels)], nn.functional.cross_entropy, method=method, macs=0.3, alpha=0.5,
        structure="4x2", min_keep=min_keep, iterations=2, progress=False,
    )  # fmt: skip
    left = work(costs, {name: int(mask.sum()) for name, mask in masks.items()})
    dense = dense_work(costs, prunable(model))
    assert dense * 0.3 - 8 * 144 < left <= dense * 0.3
    for mask in masks.values():
        blocks = mask.unflatten(1, (-1, 2)).unflatten(0, (-1, 4)).sum((1, 3))
        assert bool(((blocks == 0) | (blocks == 8)).all()) and int(mask.sum()) >= min_keep
    if method == "magnitude" and not min_keep:
        fresh, ranked = prunable(convolutions()), []
        for name, weight in fresh.items():
            scores = weight.detach().double().abs().unflatten(1, (-1, 2)).unflatten(0, (-1, 4)).sum((1, 3))
            ranked += [(float(s) / costs[name] ** 0.5, 8 * costs[name], name) for s in scores.flatten()]
        budget, expected = dense * 3 // 10, dict.fromkeys(fresh, 0)
        for _, cost, name in sorted(ranked, key=lambda one: -one[0]):
            if (budget := budget - cost) < 0:
                break
            expected[name] += 8
        assert {name: int(mask.sum()) for name, mask in masks.items()} == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "sparsity or macs must be given, got neither"),
        ({"sparsity": 0.5, "macs": 0.5}, "sparsity or macs must be given, got both"),
        ({"sparsity": 0.5, "alpha": 1.0}, "alpha must be None without macs, got 1.0"),
        ({"macs": 0.0}, "macs must be a number in (0, 1], got 0.0"),
        ({"macs": True}, "macs must be a number in (0, 1], got True"),
        ({"macs": 0.5, "alpha": -1}, "alpha must be a finite number >= 0, got -1"),
        ({"macs": 0.5, "scope": "uniform"}, "scope must be 'global' with macs, got 'uniform'"),
        (
            {"macs": 0.5, "structure": "2:4"},
            "structure must be 'unstructured', 'channels' or 'ROWSxCOLUMNS' with macs, got '2:4'",
        ),
        ({"macs": 0.01, "min_keep": 200}, "min_keep=200 asks for"),
    ],
)
def test_refuses(given: dict, words: str):
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="prune: ") as error:
        pruned(model, **given)
    assert words in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
