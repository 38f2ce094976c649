"""fused_drive_prune: the contract of one step, and what bad input gets."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
from torch import nn

import drive
from drive import Masks, fused_drive_prune
from drive.reference import drive_prune


def model_with_gradients(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)
    ).to(dtype)
    loss = nn.functional.cross_entropy(
        model(torch.randn(4, 3, 8, 8, dtype=dtype)), torch.tensor([0, 1, 2, 3])
    )
    loss.backward()
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    found |= {f"{n}.grad": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found


def assert_unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = state(model)
    assert after.keys() == before.keys()
    for name in before:
        bits = [t.reshape(-1).contiguous().view(torch.uint8) for t in (after[name], before[name])]
        assert torch.equal(*bits), name


@pytest.mark.parametrize("sparsity", (0, 0.5, 0.9, 0.993, Fraction(1, 3)))
@pytest.mark.parametrize("prune", (fused_drive_prune, drive_prune))
def test_exact_count(prune, sparsity):
    model = model_with_gradients()
    result = prune(model, sparsity=sparsity)
    weights = {"0.weight": model[0].weight, "4.weight": model[4].weight}
    total = sum(w.numel() for w in weights.values())
    assert list(result.masks) == list(weights)
    assert result.total == total
    assert result.pruned == round(sparsity * total) == total - result.kept
    assert sum(int((~m).sum()) for m in result.masks.values()) == result.pruned
    for name, weight in weights.items():
        assert torch.equal(weight != 0, result.masks[name])
    assert result.ok and not result.nonfinite


def test_equals_equations_6_and_7_literally():
    """Eq. 6, S = theta * dL/dm * dL/dtheta with dL/dm = theta * dL/dtheta, and Eq. 7, in float64."""
    model = model_with_gradients()
    products, total = {}, 0
    for name in ("0.weight", "4.weight"):
        parameter = model.get_parameter(name)
        mask_grad = (parameter.detach() * parameter.grad).double()  # rounded once, as float32
        products[name] = (mask_grad * mask_grad).abs()
        total += products[name].numel()
    score_sum = sum(p.sum() for p in products.values())
    z = torch.cat([p.flatten() for p in products.values()]) / score_sum
    kept = total - round(0.9 * total)
    weakest = z.topk(kept).values[-1]

    result = fused_drive_prune(model, sparsity=0.9)
    for name, product in products.items():
        assert torch.equal(result.masks[name], product / score_sum >= weakest)
    assert result.score_sum == pytest.approx(float(score_sum), rel=1e-12)
    assert result.threshold == pytest.approx(float(weakest), rel=1e-12)


def test_mask_grads_are_used():
    weight = torch.ones(4)
    result = fused_drive_prune(
        [weight],
        [torch.tensor([4.0, 3.0, 2.0, 1.0])],
        [torch.tensor([1.0, 10.0, 100.0, 1000.0])],
        sparsity=0.5,
    )
    assert result.masks["0"].tolist() == [False, False, True, True]
    assert result.score_sum == 4 + 30 + 200 + 1000
    assert result.threshold == pytest.approx(200 / 1234)


def test_steps_with_masks_never_revive():
    model = model_with_gradients()
    first = fused_drive_prune(model, sparsity=0.5)
    before = {name: mask.clone() for name, mask in first.masks.items()}
    again = fused_drive_prune(model, sparsity=0.8, masks=first.masks)
    for name, mask in first.masks.items():
        assert again.masks[name] is mask, "updated in place"
        assert not (mask & ~before[name]).any()
    assert again.pruned == round(0.8 * again.total)
    fewer = fused_drive_prune(model, sparsity=0.1, masks=first.masks)
    assert fewer.pruned == again.pruned, "never fewer zeros than before"


def test_ties_keep_the_lower_global_index():
    weights = {"a": torch.ones(3, 2).t(), "b": torch.ones(4)}
    masks = fused_drive_prune(
        weights, {n: torch.ones_like(w) for n, w in weights.items()}, sparsity=0.6
    ).masks
    assert masks["a"].flatten().tolist() == [True] * 4 + [False] * 2
    assert not masks["b"].any()


def test_all_zero_scores_and_denormals():
    zeros = fused_drive_prune([torch.zeros(10)], [torch.ones(10)], sparsity=0.3)
    assert zeros.masks["0"].tolist() == [True] * 7 + [False] * 3
    assert zeros.score_sum == 0 and zeros.threshold == 0
    tiny = torch.tensor([3e-45, 1e-45, 2e-44, 0.0])
    result = fused_drive_prune([tiny], [torch.ones(4)], sparsity=0.5)
    assert result.masks["0"].tolist() == [True, False, True, False]


def test_min_keep_guards_every_tensor():
    weights = [torch.full((100,), 1e-3), torch.ones(100), torch.ones(2)]
    grads = [torch.ones_like(w) for w in weights]
    bare = fused_drive_prune([w.clone() for w in weights], grads, sparsity=0.9)
    assert bare.collapsed == ["0", "2"]
    guarded = fused_drive_prune([w.clone() for w in weights], grads, sparsity=0.9, min_keep=3)
    assert [t.kept for t in guarded.per_tensor] == [3, 20 - 3 - 2, 2]
    assert guarded.collapsed == []


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_whole_model_in_another_dtype(dtype):
    model = model_with_gradients(dtype)
    twin = copy.deepcopy(model)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad.clone()
    ours, oracle = fused_drive_prune(model, sparsity=0.95), drive_prune(twin, sparsity=0.95)
    for name, mask in ours.masks.items():
        assert torch.equal(mask, oracle.masks[name])


def test_tied_weights_count_once():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    model(torch.randn(3, 6)).sum().backward()
    result = fused_drive_prune(model, sparsity=0.5)
    assert list(result.masks) == ["0.weight"] and result.total == 36
    assert model[1].weight.count_nonzero() == 18
    weight = torch.randn(8)
    assert fused_drive_prune([weight, weight], [weight, weight], sparsity=0.5).total == 8


def test_include_chooses():
    model = model_with_gradients()
    result = fused_drive_prune(
        model, sparsity=0.5, include=lambda name, module, tensor: name.endswith("bias")
    )
    assert list(result.masks) == ["0.bias", "1.bias", "4.bias"]


def test_empty_tensors_and_scalars():
    result = fused_drive_prune(
        [torch.empty(0, 3), torch.tensor(2.0)], [torch.empty(0, 3), torch.tensor(1.0)], sparsity=0
    )
    assert result.kept == 1 and result.collapsed == []
    nothing = fused_drive_prune([torch.empty(0)], [torch.empty(0)], sparsity=0.5)
    assert nothing.total == 0 and nothing.sparsity == 0.0 and nothing.threshold == float("inf")


def test_wrapped_models_keep_their_names():
    model = model_with_gradients()
    assert list(fused_drive_prune(torch.compile(model), sparsity=0.5).masks) == ["0.weight", "4.weight"]


def test_check_finite_false_is_a_no_op():
    model = model_with_gradients()
    model[4].weight.grad[3, 5] = torch.nan
    before = state(model)
    result = fused_drive_prune(model, sparsity=0.5, check_finite=False)
    assert not result.ok and result.nonfinite == {"4.weight": 1}
    assert all(mask.all() for mask in result.masks.values()) and result.pruned == 0
    assert_unchanged(model, before)


def test_summary_names_everything():
    result = fused_drive_prune(model_with_gradients(), sparsity=0.9)
    assert "0.weight" in result.summary() and "threshold" in result.summary()
    assert f"{result.kept:,} of {result.total:,}" in repr(result)


# --- bad input: one clear line, nothing changed ---------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        ({"sparsity": 1.3}, ValueError, r"fused_drive_prune: sparsity must be in \[0, 1\), got 1.3"),
        ({"sparsity": 1.0}, ValueError, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, ValueError, "got -0.1"),
        ({"sparsity": float("nan")}, ValueError, "got nan"),
        ({"sparsity": "0.9"}, TypeError, "sparsity must be a number in .* got '0.9'"),
        ({"sparsity": True}, TypeError, "got True"),
        ({"sparsity": 0.5, "min_keep": -1}, ValueError, "min_keep must be an integer >= 0, got -1"),
        ({"sparsity": 0.5, "min_keep": 1.5}, ValueError, "got 1.5"),
        (
            {"sparsity": 0.99, "min_keep": 20},
            ValueError,
            "min_keep=20 asks for 40 survivors.* leave 31 of 3096",
        ),
        ({"sparsity": 0.5, "include": lambda *_: False}, ValueError, "selection of tensors is empty"),
        ({"sparsity": 0.5, "grads": {}}, ValueError, "grads has no entry for 0.weight"),
        ({"sparsity": 0.5, "grads": [torch.ones(1)]}, ValueError, "grads must hold 2 tensors, got 1"),
        ({"sparsity": 0.5, "masks": Masks({})}, ValueError, "there is no mask for 0.weight"),
        (
            {"sparsity": 0.5, "masks": Masks({"0.weight": torch.ones(2, dtype=torch.bool)})},
            ValueError,
            "no mask for 4.weight",
        ),
    ),
)
def test_bad_arguments(options, error, message):
    model = model_with_gradients()
    before = state(model)
    with pytest.raises(error, match=message):
        fused_drive_prune(model, **options)
    assert_unchanged(model, before)


def test_masks_of_another_model():
    model, other = (
        model_with_gradients(),
        nn.Sequential(nn.Conv2d(3, 8, 5), nn.Identity(), nn.Identity(), nn.Flatten(), nn.Linear(5, 2)),
    )
    masks = Masks({f"{i}.weight": torch.ones_like(other[i].weight, dtype=torch.bool) for i in (0, 4)})
    with pytest.raises(
        ValueError, match=r"masks\[0.weight\] must have shape \(8, 3, 3, 3\), got \(8, 3, 5, 5\)"
    ):
        fused_drive_prune(model, sparsity=0.5, masks=masks)


def test_no_gradient():
    model = model_with_gradients()
    model[4].weight.grad = None
    with pytest.raises(ValueError, match="4.weight has no gradient: call loss.backward"):
        fused_drive_prune(model, sparsity=0.5)
    model[4].weight.requires_grad_(False)
    assert "4.weight" not in fused_drive_prune(model, sparsity=0.5).masks, "frozen"
    with pytest.raises(ValueError, match="4.weight has no gradient: it does not require one, or exclude it"):
        fused_drive_prune(model, sparsity=0.5, include="*.weight")


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
@pytest.mark.parametrize("where", ("weight", "grad"))
def test_non_finite(bad, where):
    model = model_with_gradients()
    with torch.no_grad():
        tensor = model[4].weight if where == "weight" else model[4].weight.grad
        tensor.view(-1)[[1, 2, 7]] = bad
    before = state(model)
    with pytest.raises(ValueError, match=r"non-finite score in 4.weight \(3 of 2880 entries\)"):
        fused_drive_prune(model, sparsity=0.5)
    assert_unchanged(model, before)


def test_non_finite_leaves_given_masks():
    model = model_with_gradients()
    masks = fused_drive_prune(model, sparsity=0.5).masks
    before = copy.deepcopy(masks)
    model[0].weight.grad.fill_(torch.nan)
    with pytest.raises(ValueError, match="non-finite score in 0.weight"):
        fused_drive_prune(model, sparsity=0.9, masks=masks)
    for name in masks:
        assert torch.equal(masks[name], before[name])


@pytest.mark.parametrize(
    ("weight", "grad", "error", "message"),
    (
        (torch.ones(3).int(), torch.ones(3), TypeError, "0 must be float32, .*got torch.int32"),
        (torch.ones(3, dtype=torch.cfloat), torch.ones(3), TypeError, "got torch.complex64"),
        (torch.ones(3, device="meta"), torch.ones(3), ValueError, "0 has no data: it is on the meta device"),
        (torch.eye(3).to_sparse(), torch.eye(3), TypeError, "0 must be a dense tensor, got .*sparse_coo"),
        (torch.ones(1).expand(3), torch.ones(3), ValueError, "0 must not overlap itself"),
        (torch.ones(3), torch.ones(4), ValueError, r"grads\[0\] must have the weight's shape .*3.* got .*4"),
        (torch.ones(3), torch.ones(3).half(), TypeError, "dtype torch.float32, got torch.float16"),
        (torch.ones(3), torch.ones(3, device="meta"), ValueError, "device cpu, got meta"),
        (torch.ones(3, 3), torch.eye(3).to_sparse(), TypeError, "layout torch.strided, got torch.sparse_coo"),
        ("weight", torch.ones(3), TypeError, "0 must be a tensor, got str"),
        (torch.ones(3), None, TypeError, r"grads\[0\] must be a tensor, got NoneType"),
        (torch.ones(3, requires_grad=True) * 2, "own", ValueError, "0 is not a leaf tensor"),
    ),
)  # fmt: skip
def test_bad_tensors(weight, grad, error, message):
    with pytest.raises(error, match=message):
        fused_drive_prune([weight], None if grad == "own" else [grad], sparsity=0.5)


def test_bad_target():
    with pytest.raises(
        TypeError, match="target must be a module, a mapping or a sequence of tensors, got Tensor"
    ):
        fused_drive_prune(torch.ones(3), sparsity=0.5)


def test_shared_memory_between_parameters():
    weight = torch.randn(4)
    with pytest.raises(ValueError, match="1 shares memory with 0"):
        fused_drive_prune([weight, weight.view(4)], [weight, weight], sparsity=0.5)


def test_lazy_module():
    with pytest.raises(ValueError, match="0.weight is not initialised yet"):
        fused_drive_prune(nn.Sequential(nn.LazyLinear(3)), sparsity=0.5)


def test_frozen_tensor_with_given_gradient():
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert drive.fused_drive_prune([weight], [torch.ones(4)], sparsity=0.5).kept == 2
    assert weight.tolist() == [0, 0, 3, 4]
