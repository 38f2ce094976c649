"""min_keep counts per matrix: experts, gates, q, k and v, groups of convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from worlds import returned, run

import drive
from drive import Masks, fused_drive_prune
from drive.layers import Weight
from drive.reference import drive_prune
from drive.targets import prunable


class Experts(nn.Module):
    """[experts, outputs, inputs], two matrices in the first parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Parameter(torch.randn(3, 8, 5)), nn.Parameter(torch.randn(3, 5, 4))


class Transposed(Experts):
    """[experts, inputs, outputs]: gate and up lie side by side in every row."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Parameter(torch.randn(3, 5, 8)), nn.Parameter(torch.randn(3, 4, 5))


def experts(outputs: int, inputs: int) -> dict[str, Weight]:
    one = {"outputs": outputs, "inputs": inputs, "matrices": (0,), "stacked": outputs}
    return {"gate_up": Weight(**one, parts=2), "down": Weight(**one)}


LAYERS: Any = {Experts: experts(1, 2), Transposed: experts(2, 1)}


def chunks(number: int, dim: int = 0) -> Callable[[Tensor], Sequence[Tensor]]:
    return lambda tensor: tensor.chunk(number, dim)


def of_experts(number: int, dim: int) -> Callable[[Tensor], Sequence[Tensor]]:
    return lambda tensor: [part for expert in tensor for part in expert.chunk(number, dim)]


# module, and by parameter how its matrices are taken out
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Callable[[Tensor], Sequence[Tensor]]]]] = {
    "attention": (lambda: nn.MultiheadAttention(6, 2), {"in_proj_weight": chunks(3)}),
    "LSTM": (lambda: nn.LSTM(5, 4), {"weight_ih_l0": chunks(4), "weight_hh_l0": chunks(4)}),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), {"weight": chunks(8)}),
    "groups": (lambda: nn.Conv1d(6, 4, 3, groups=2).to(torch.bfloat16), {"weight": chunks(2)}),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), {"weight": chunks(2)}),
    "channels last": (
        lambda: nn.Conv2d(4, 6, 3, groups=2).to(memory_format=torch.channels_last),
        {"weight": chunks(2)},
    ),
    "experts": (Experts, {"gate_up": of_experts(2, 0), "down": of_experts(1, 0)}),
    "transposed experts": (Transposed, {"gate_up": of_experts(2, 1), "down": of_experts(1, 0)}),
}


def prepared(case: str, values: str = "normal") -> tuple[nn.Module, dict[str, Callable[[Tensor], Any]]]:
    """The model and a Linear layer, whose matrices are of very different sizes; gradients are set."""
    torch.manual_seed(0)
    build, apart = CASES[case]
    model = nn.ModuleList([build(), nn.Linear(40, 30)])
    with torch.no_grad():
        for number, weight in enumerate(prunable(model, layers=LAYERS).values()):
            weight.mul_(10.0 ** -(number % 3))
            weight.grad = torch.randn_like(weight)
            if values == "equal":
                weight.fill_(1)
                weight.grad.fill_(1)
    return model, {f"0.{key}": split for key, split in apart.items()}


def expected(model: nn.Module, apart: dict[str, Callable[[Tensor], Any]], **options: Any) -> Masks:
    """Every matrix as a tensor of its own."""
    weights = prunable(model, layers=LAYERS)
    pieces: dict[str, list[Tensor]] = {
        name: [part.detach().clone() for part in apart.get(name, lambda w: [w])(w)]
        for name, w in weights.items()
    }
    grads = [part.clone() for name, w in weights.items() for part in apart.get(name, lambda g: [g])(w.grad)]
    flat = [part for parts in pieces.values() for part in parts]
    found = iter(drive_prune(flat, grads, **options).masks.values())
    masks = {}
    for name, weight in weights.items():
        mask = torch.empty_like(weight, dtype=torch.bool)
        for part in apart.get(name, lambda m: [m])(mask):
            part.copy_(next(found))
        masks[name] = mask
    return Masks(masks)


@pytest.mark.parametrize("values", ("normal", "equal"))
@pytest.mark.parametrize("case", CASES)
def test_every_matrix_keeps_some(case: str, values: str):
    model, apart = prepared(case, values)
    masks = expected(model, apart, sparsity=0.97, min_keep=2)
    found = fused_drive_prune(model, sparsity=0.97, min_keep=2, layers=LAYERS)
    weights = prunable(model, layers=LAYERS)
    for name, mask in found.masks.items():
        assert torch.equal(mask, masks[name]) and not weights[name][~mask].any(), name
        assert all(int(part.sum()) >= 2 for part in apart.get(name, lambda m: [m])(mask)), name
    total = sum(w.numel() for w in weights.values())
    assert found.pruned == round(0.97 * total)
    assert [count.kept for count in found.per_tensor] == [int(mask.sum()) for mask in masks.values()]


@pytest.mark.parametrize("case", ("experts", "depthwise"))
def test_masks_from_before_and_bad_scores(case: str):
    model, _ = prepared(case)
    before = fused_drive_prune(model, sparsity=0.5, layers=LAYERS).masks
    found = fused_drive_prune(model, sparsity=0.9, masks=before, min_keep=1, layers=LAYERS)
    assert found.masks["0." + {"experts": "down", "depthwise": "weight"}[case]].any()
    assert found.pruned == round(0.9 * found.total)
    name, weight = next(iter(prunable(model, layers=LAYERS).items()))
    weight.grad[weight != 0] = torch.nan
    with pytest.raises(ValueError, match=rf"non-finite score in {name} \(\d+ of {weight.numel()} entries\)"):
        fused_drive_prune(model, sparsity=0.95, masks=before, min_keep=1, layers=LAYERS)


def test_what_is_asked_for_is_counted_by_matrix():
    model, _ = prepared("depthwise")
    with pytest.raises(ValueError, match=r"min_keep=9 asks for 81 survivors, 1247 pruned leave 25 of 1272"):
        fused_drive_prune(model, sparsity=0.98, min_keep=9)


def test_a_mapping_has_no_matrices():
    model, _ = prepared("depthwise")
    weights = prunable(model)
    grads = {name: weight.grad for name, weight in weights.items()}
    found = fused_drive_prune({n: w.detach() for n, w in weights.items()}, grads, sparsity=0.98, min_keep=9)
    assert found.pruned == round(0.98 * found.total)


@pytest.mark.parametrize("method", ("magnitude", "random", "snip"))
def test_of_every_method(method: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(128, 4))
    with torch.no_grad():
        model[1].weight[3] *= 1e-6
    batches = [(torch.randn(4, 3, 8, 8), torch.randint(4, (4,)))]
    options = {"method": method, "sparsity": 0.9, "min_keep": 2, "progress": False}
    masks = drive.prune(model, batches, F.cross_entropy, **options)
    assert (masks["1.weight"].flatten(1).sum(1) >= 2).all()
    assert sum(int((~m).sum()) for m in masks.values()) == round(0.9 * sum(m.numel() for m in masks.values()))


def test_blocks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(16, 16, 1, groups=4), nn.Conv1d(16, 16, 1))
    with torch.no_grad():
        model[0].weight[4:8] *= 1e-6
    options = {"method": "magnitude", "sparsity": 0.7, "structure": "2x2", "progress": False}
    masks = drive.prune(model, [], min_keep=3, **options)
    assert all(int(group.sum()) >= 4 for group in masks["0.weight"].chunk(4)), "a whole block"
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert kept == 4 * round(0.3 * (4 * 4 + 64))


def test_two_of_four_keeps_enough_of_each_matrix():
    model = nn.Sequential(nn.Conv1d(16, 16, 1, groups=4))
    options = {"method": "magnitude", "sparsity": 0.5, "structure": "2:4", "progress": False}
    with pytest.raises(ValueError, match="at most 8, what a matrix of 0.weight keeps, got 9"):
        drive.prune(model, [], min_keep=9, **options)
    drive.prune(model, [], min_keep=8, **options)


PLACED = (lambda w: [Shard(0)], lambda w: [Replicate()], lambda w: [Shard(w.dim() - 1)])


def spread() -> None:
    """Each tensor placed in turn by rows, as copies, and by its last dimension: the same masks."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for case in CASES:
        model, apart = prepared(case)
        masks = expected(model, apart, sparsity=0.97, min_keep=2)
        for shift in range(len(PLACED)):
            model, _ = prepared(case)
            for number, (name, weight) in enumerate(prunable(model, layers=LAYERS).items()):
                place = PLACED[(number + shift) % len(PLACED)](weight)

                def placed(tensor: Tensor, place=place) -> Tensor:
                    return distribute_tensor(tensor.detach().clone(), mesh, place, src_data_rank=None)

                module, key = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
                setattr(module, key, nn.Parameter(placed(weight)))
                getattr(module, key).grad = placed(weight.grad)
            found = fused_drive_prune(model, sparsity=0.97, min_keep=2, layers=LAYERS)
            for name, mask in found.masks.items():
                assert torch.equal(mask.full_tensor(), masks[name]), (case, shift, name)
            assert [count.kept for count in found.per_tensor] == [int(m.sum()) for m in masks.values()]


@pytest.mark.parametrize("size", (1, 2, 3))
def test_spread_over_ranks(size: int):
    returned(run(size, spread))


def rows() -> None:
    """Of a rank's own rows nobody knows the matrices: tensors count as a whole."""
    rank = torch.distributed.get_rank()
    whole = nn.Conv1d(8, 8, 1, groups=8)
    with torch.no_grad():
        whole.weight.copy_(torch.arange(8.0).view(8, 1, 1) + 1)
    mine = whole.weight.detach()[rank * 4 : rank * 4 + 4].clone()
    found = fused_drive_prune(
        {"w": mine}, {"w": torch.ones_like(mine)}, sparsity=0.75, min_keep=2,
        process_group=torch.distributed.group.WORLD,
    )  # fmt: skip
    assert found.kept == 2 and found.masks["w"].flatten().tolist() == [False, False, rank == 1, rank == 1]


def test_rows_count_as_whole_tensors():
    returned(run(2, rows))
