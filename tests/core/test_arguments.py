"""Arguments other than Python's own numbers and `Masks`: served as what they are, or refused in a line."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import drive
from drive import Masks, fused_drive_prune, methods


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4))


BATCHES = [
    (torch.randn(8, 6, generator=torch.Generator().manual_seed(s)), torch.arange(8) % 4) for s in range(3)
]


def prune(loss_fn: Any = F.cross_entropy, model: nn.Module | None = None, **options: Any) -> Masks:
    model = model or network()
    options = {"iterations": 3, "progress": False, **options}
    if "macs" not in options:
        options = {"sparsity": 0.5, **options}
    return drive.prune(model, BATCHES, loss_fn, **options)


def fused(**options: Any) -> drive.PruneResult:
    weights = {"a": torch.arange(1.0, 13).view(3, 4), "b": torch.arange(7.0, 13)}
    grads = {name: torch.ones_like(weight) for name, weight in weights.items()}
    return fused_drive_prune(weights, grads, **options)


def same(one: Masks, two: Masks) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


WHOLE = np.int8, np.uint8, np.int32, np.int64, np.uint64
REAL = np.float16, np.float32, np.float64, Fraction


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize(
    "name", ("iterations", "accumulate", "min_keep", "seed", "round_steps", "min_keep of channels")
)
def test_whole_numbers(kind: Callable[[int], Any], name: str):
    argument, _, channels = name.partition(" of ")
    options: dict[str, Any] = {"method": "gradual"} if argument == "round_steps" else {}
    if channels:
        pytest.importorskip("torch_pruning")
        options = {"structure": "channels", "sparsity": 0.25}
    assert same(prune(**options, **{argument: kind(2)}), prune(**options, **{argument: 2}))


@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize("name", ("sparsity", "macs", "alpha"))
def test_real_numbers(kind: Callable[[float], Any], name: str):
    options: dict[str, Any] = {"macs": 0.5} if name == "alpha" else {}
    assert same(prune(**options, **{name: kind(0.625)}), prune(**options, **{name: 0.625}))


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_numbers_of_one_step(kind: Callable[[int], Any]):
    costs = {"a": kind(3), "b": kind(5)}
    found = fused(costs=costs, max_cost=kind(40), min_keep=kind(1), alpha=kind(1))
    expected = fused(costs={"a": 3, "b": 5}, max_cost=40, min_keep=1, alpha=1)
    assert same(found.masks, expected.masks) and found.cost_left == expected.cost_left


@pytest.mark.parametrize("kind", REAL)
def test_real_numbers_of_one_step(kind: Callable[[float], Any]):
    assert same(fused(sparsity=kind(0.5)).masks, fused(sparsity=0.5).masks)


def test_counts_are_those_of_the_number_itself():
    """numpy's arithmetic in 32 bits, or in 8, would make another of them."""
    weights = torch.ones(100_001)
    for share in (np.float32(0.7), np.float16(0.7)):
        result = fused_drive_prune([weights], [torch.ones(100_001)], sparsity=share)
        assert result.pruned == round(float(share) * 100_001)
        model = nn.Linear(1, 100_001)
        masks = drive.prune(model, [], method="magnitude", sparsity=share, progress=False)
        assert masks.sparsity() == pytest.approx(round(float(share) * 100_001) / 100_001, abs=1e-12)
    costs = {"a": np.int8(100), "b": np.int8(100)}
    assert fused(costs=costs, max_cost=1_000_000).kept == 18
    assert fused(costs={"a": np.int32(2**31 - 1), "b": 1}, max_cost=2**40).kept == 18


@pytest.mark.parametrize("seed", (-(2**63), -1, 2**63, 2**64 - 1))
def test_all_seeds_that_torch_takes(seed: int):
    torch.manual_seed(seed)
    noise = torch.rand(96, dtype=torch.float64)
    masks = drive.prune(
        network(), [], method="random", sparsity=0.5, seed=seed, progress=False, include="0.weight"
    )
    assert torch.equal(masks["0.weight"].flatten(), noise >= noise.sort().values[48])


@pytest.mark.parametrize(
    "bad", (True, np.True_, 2.0, np.float64(2), "2", None, torch.tensor(2), np.array(2), 2j)
)
def test_what_is_no_whole_number(bad: Any):
    for name in ("iterations", "accumulate", "seed", "min_keep"):
        if bad is None and name != "seed":
            continue  # the default
        with pytest.raises(ValueError, match=f"^prune: {name} must be an integer "):
            prune(**{name: bad})
    for name, options in (
        ("min_keep", {"sparsity": 0.5}),
        ("max_cost", {"costs": {"a": 1, "b": 1}}),
        (r"costs\['b'\]", {"max_cost": 9}),
    ):
        given = {"costs": {"a": 1, "b": bad}} if "costs" in name else {name: bad}
        with pytest.raises(ValueError, match=f"^fused_drive_prune: {name} must be an integer "):
            fused(**options, **given)


@pytest.mark.parametrize(
    "bad", (False, np.False_, "0.5", torch.tensor(0.5), np.array(0.5), Decimal("0.5"), 0.5j, [0.5])
)
def test_what_is_no_number(bad: Any):
    for name, options, error in (
        ("sparsity", {}, TypeError),
        ("macs", {}, ValueError),
        ("alpha", {"macs": 0.5}, ValueError),
    ):
        with pytest.raises(error, match=f"^prune: {name} must be a .*number"):
            prune(**options, **{name: bad})
    with pytest.raises(TypeError, match="^fused_drive_prune: sparsity must be a number in"):
        fused(sparsity=bad)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"sparsity": Fraction(10**400)}, r"sparsity must be in \[0, 1\), got 1000"),
        ({"sparsity": Fraction(10**40 - 1, 10**40)}, r"sparsity must be in \[0, 1\), got 9999"),
        ({"sparsity": np.float32("nan")}, r"sparsity must be in \[0, 1\), got nan"),
        ({"macs": 10**400}, r"macs must be a number in \(0, 1\], got 1000"),
        (
            {"macs": 0.5, "alpha": np.float64("inf")},
            "alpha must be a finite number >= 0, got (np.float64|inf)",
        ),
        (
            {"min_keep": 2**63},
            "min_keep must be an integer >= 0 and <= 9223372036854775807, got 9223372036854775808",
        ),
        ({"seed": 2**64}, r"seed must be an integer from -2\^63 to 2\^64 - 1, got 18446744073709551616"),
        (
            {"seed": -(2**63) - 1},
            r"seed must be an integer from -2\^63 to 2\^64 - 1, got -9223372036854775809",
        ),
    ),
)
def test_numbers_out_of_range(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^prune: {message}"):
        prune(**options)


@pytest.mark.parametrize("name", ("structure", "scope"))
@pytest.mark.parametrize("bad", (4, ["global"], ("2:4",)))
def test_what_is_no_name(name: str, bad: Any):
    with pytest.raises(TypeError, match=f"^prune: {name} must be a name, got "):
        prune(**{name: bad})


def test_numbers_of_methods():
    assert methods.Drive(powers=(np.int64(1), np.uint8(2))).powers == (1, 2)
    assert methods.EarlyCrop(latest=np.int64(3)).latest == 3
    assert methods.Imp(rounds=np.int64(3), rewind=np.int64(2)).rewind == 2
    for make, message in (
        (
            lambda: methods.Drive(powers=(1.0, 2)),
            "Drive: powers must be whole, 0 to 3 and not both 0, got 1.0",
        ),
        (
            lambda: methods.Drive(powers=(True, 2)),
            "Drive: powers must be whole, 0 to 3 and not both 0, got True",
        ),
        (lambda: methods.EarlyCrop(latest=2.5), "EarlyCrop: latest must be an integer >= 1, got 2.5"),
        (lambda: methods.Imp(rounds=2.5), "Imp: rounds must be an integer >= 1, got 2.5"),
        (lambda: methods.Imp(rewind=-1), "Imp: rewind must be an integer >= 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


# ---- masks


@pytest.mark.parametrize("structure", ("unstructured", "2x2", "channels"))
def test_a_mapping_of_masks(structure: str):
    if structure == "channels":
        pytest.importorskip("torch_pruning")
    options = {"method": "magnitude", "structure": structure}
    first = prune(**options, sparsity=0.25)
    plain = {name: mask.clone() for name, mask in first.items()}
    assert same(prune(**options, masks=plain), prune(**options, masks=first))
    assert all(torch.equal(plain[name], first[name]) for name in first), "they are not changed"


def test_a_mapping_of_masks_is_updated_in_place_by_one_step():
    plain = {"a": torch.rand(3, 4) < 0.9, "b": torch.ones(6, dtype=torch.bool)}
    expected = fused(sparsity=0.5, masks=Masks({name: mask.clone() for name, mask in plain.items()}))
    result = fused(sparsity=0.5, masks=plain)
    assert all(result.masks[name] is plain[name] for name in plain) and same(result.masks, expected.masks)


@pytest.mark.parametrize(
    ("bad", "message"),
    (
        ([1], "Masks: masks must be a mapping of names to tensors, got list"),
        ("masks.safetensors", "Masks: masks must be a mapping of names to tensors, got str"),
        ({"a": 1}, "Masks: a must be a bool tensor, got int"),
        ({"a": torch.ones(3, 4)}, "Masks: a must be a bool tensor, got torch.float32"),
    ),
)
def test_masks_that_are_none(bad: Any, message: str):
    pytest.importorskip("torch_pruning")
    for call in (
        lambda: prune(masks=bad),
        lambda: prune(masks=bad, structure="channels"),
        lambda: fused(sparsity=0.5, masks=bad),
        lambda: drive.shrink(network(), bad, torch.ones(1, 6)),
        lambda: drive.sparse.convert(network(), bad, torch.ones(1, 6), deterministic=True),
    ):
        with pytest.raises(TypeError, match=message):
            call()


# ---- losses and weights


@pytest.mark.parametrize("shape", ((8,), (8, 4), (1, 2), ()))
def test_a_loss_that_is_no_number(shape: tuple[int, ...]):
    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum() * torch.ones(shape) * (1 if shape else 1j)

    hint = "take its mean? (reduction='mean')" if shape else "it is complex"
    message = re.escape(f"the loss must be a scalar tensor, got a tensor of shape {shape}: {hint}")
    for method in ("drive", "crop", "gradual"):
        with pytest.raises(TypeError, match=message):
            prune(loss_fn, method=method)


DTYPES = (
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int32,
    torch.bool,
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_that_nothing_prunes(dtype: torch.dtype):
    weight, mask = torch.ones(2, 2).to(dtype), torch.zeros(2, 2, dtype=torch.bool)
    model = nn.Module()
    model.w = nn.Parameter(weight, requires_grad=False)
    for call in (
        lambda: Masks({"w": mask}).apply_({"w": weight}),
        lambda: Masks({"w": mask}).apply_(model),
        lambda: Masks({"w": mask}).attach(model),
        lambda: fused_drive_prune({"w": weight}, {"w": weight}, sparsity=0.5),
        lambda: drive.prune(model, [], method="magnitude", sparsity=0.5, include="w"),
        lambda: Masks.dense({"w": weight}),
    ):
        with pytest.raises(
            (TypeError, ValueError), match=f": w must be float32, .* got {dtype}|include must name weights"
        ):
            call()
    assert torch.equal(weight, torch.ones(2, 2).to(dtype))
