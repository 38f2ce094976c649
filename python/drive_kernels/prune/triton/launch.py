"""drive::prune_ and drive::prune_to_cost_ in Triton: for GPUs where the compiled kernels are missing.

The step of csrc/prune/cpu/step.h without the host ever waiting: every kernel reads from device memory what
it has to do and returns early where that is nothing, so a step can be captured in a CUDA graph (after a first
call, which compiles). All tensors go through one work list of chunks.

  1. Sample: random keys, sorted, bracket the threshold, low <= T <= high (sample, bracket).
  2. Survey (reads theta, G and an old mask): per chunk, how many keys lie above, at and inside the bracket;
     those inside are listed in the order of the entries; and of plain chunks two bits an entry, "at or above
     it" and "inside". Also the sum of |S|, and the count of non-finite scores, which makes everything that
     follows a no-op (survey).
  3. Threshold T, the k-th largest key: the counts say whether it lies on an edge of the bracket, or inside,
     where radix selection among the listed keys finds it; or outside, or the list was too short, then the
     same goes through all entries (decide, count_digit, pick_digit).
  4. Ties: of the entries on the threshold those with the lowest global index, in row-major order, survive.
     They are counted by chunk; a running sum finds the chunk with the last survivor, a look at that chunk
     finds it (count_ties, locate, recount, cut).
  5. Apply (reads theta, the bits and the list, if T lies inside the bracket or all on its upper edge survive;
     else, and in chunks that are not plain, theta, G and old mask again; writes theta, mask). All memory was
     taken before (apply_bits, apply_keys, apply_others, finish).

With min_keep, steps 3 and 4 come first for all tensors at once, through all entries: what they choose, the
guards, survives in any case, and the global selection is among the other entries.

drive::prune_to_cost_ is the same step with what entries cost in place of their number. All of a tensor cost
the same: chunks are counted as before, and counts multiplied by the chunk's cost when they are added up. The
sample is one by cost. T is the key at which the costs of the largest keys reach the budget; listed keys are
counted chunk by chunk (count_listed), and ties survive up to the first that does not fit (locate, cut). Where
none does, the weakest survivor is looked for above T (look_above). The list is four times as long.

Bytes an entry, float32: read 8, written 1/4; read 4 1/4, written 4 + 1: 17.5, and 0.2 for the list. An old
mask is 1 more. Where apply goes by keys it reads 8 instead of 4 1/4, and the old mask again. Scratch: 0.25
byte an entry for the bits, 0.06 for the listed keys (0.13 for 64-bit ones), and 0.02 for the counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from drive_kernels.launching import launch_kernel
from drive_kernels.prune.op import Outputs

from . import host
from .arguments import check, check_costs
from .bracket import bracket, list_chunks, sample
from .passes import apply_bits, apply_keys, apply_others, finish, survey
from .search import count_digit, count_listed, decide, pick_digit
from .tables import BUCKETS, COUNTS, DIGIT_BITS
from .ties import count_ties, cut, locate, recount
from .weakest import look_above


def _step(items: list[host.Item], wide: bool, fresh: bool, budget: int, min_keep: int) -> Outputs:
    t = host.TUNING
    entries, chunks = sum(item.numel for item in items), sum(item.chunks for item in items)
    plain = sum(item.plain_chunks for item in items)
    disorderly = any(item.walk != item.logical_walk for item in items)
    costed = any(item.cost != 1 or item.scale != 1 for item in items)
    listed = entries // t.entries_a_listed_key * (t.listed_by_cost if costed else 1)
    samples, capacity = host.samples_of(entries), max(listed, t.least_listed)
    keys = torch.int64 if wide else torch.int32
    table = host.on_device(
        host.table_of(items, wide, budget, min_keep, samples, capacity), items[0].weight.device
    )
    # arguments of the kernels, by their names
    arguments: dict[str, Any] = {
        "table": table,
        "chunk_item": table.new_empty(chunks, dtype=torch.int32),
        "chunk_cost": table.new_empty(chunks if costed else 0),
        "work": table.new_empty(chunks, dtype=torch.int32),
        "work_item": table.new_empty(chunks, dtype=torch.int32),
        "keys": table.new_empty(samples, dtype=keys),
        "listed": table.new_empty(capacity, dtype=keys),
        "counts": table.new_empty(COUNTS.value, chunks, dtype=torch.int32),
        "pairs": table.new_empty(plain, t.chunk // 4, dtype=torch.uint8),
        "starts": table.new_empty(chunks),
        "sums": table.new_empty(chunks, dtype=torch.float64),
        "histogram": table.new_zeros(len(items) if min_keep else 1, BUCKETS.value),
        "ties": table.new_zeros(chunks, dtype=torch.int32),
        "kept": table.new_zeros(len(items)),
        "nonfinite": table.new_zeros(len(items)),
        "scores": table.new_empty(2, dtype=torch.float64),
        "BLOCK": t.chunk,
        "SAMPLES_A_PROGRAM": t.samples_a_program,
        "LISTED_AT_ONCE": t.listed_at_once,
        "SIGMAS": t.sigmas,
        "FRESH": fresh,
        "WIDE": wide,
        "COSTED": costed,
    }

    def launch(kernel: Any, programs: int, warps: int, **constants: bool) -> None:
        everything = {**arguments, **constants}
        own = {name: everything[name] for name in kernel.arg_names}
        if programs:  # no fusion to FMA: products are rounded as everywhere else
            launch_kernel(kernel, (programs,), **own, num_warps=warps, enable_fp_fusion=False)

    def in_costs(counts: Tensor) -> Tensor:
        """What those entries cost that are counted by chunk."""
        return counts * arguments["chunk_cost"] if costed else counts

    def sum_up_ties(guarding: bool) -> None:
        ties = arguments["ties"]
        arguments["ties_up_to"] = (ties if guarding else in_costs(ties)).cumsum(0)

    def select(selections: int, guarding: bool) -> None:
        """Steps 3 and 4."""
        programs = min(chunks, t.programs)
        for _ in range(host.key_bits(wide) // DIGIT_BITS.value):
            launch(count_digit, programs, t.chunk_warps, GUARDING=guarding)
            if costed and not guarding:
                launch(count_listed, programs, t.few_warps)
            launch(pick_digit, selections, t.few_warps, GUARDING=guarding)
        launch(count_ties, programs, t.chunk_warps, GUARDING=guarding)
        sum_up_ties(guarding)
        launch(locate, selections, t.few_warps, GUARDING=guarding)
        if disorderly:
            launch(recount, programs, t.chunk_warps)
            sum_up_ties(guarding)
            launch(locate, selections, t.few_warps, GUARDING=guarding)
        launch(cut, selections, t.chunk_warps, GUARDING=guarding)

    launch(list_chunks, -(-chunks // t.chunk), t.chunk_warps)
    if min_keep:
        select(len(items), guarding=True)
    if samples:
        launch(sample, samples // t.samples_a_program, t.few_warps)
        arguments["keys"] = arguments["keys"].sort().values
        launch(bracket, 1, t.few_warps)
    launch(survey, plain, t.plain_warps, PLAIN_ONES=True)
    launch(survey, chunks - plain, t.chunk_warps, PLAIN_ONES=False)
    arguments["totals"], arguments["total"] = in_costs(arguments["counts"]).sum(1), arguments["sums"].sum()
    launch(decide, 1, t.few_warps)
    select(1, guarding=False)
    if costed:
        launch(look_above, min(chunks, t.programs), t.chunk_warps)
    launch(apply_bits, plain, t.plain_warps)
    launch(apply_keys, min(plain, t.programs), t.plain_warps)
    if plain < chunks or disorderly:
        launch(apply_others, min(chunks, t.programs), t.chunk_warps)
    launch(finish, 1, t.few_warps)
    return arguments["kept"], arguments["nonfinite"], arguments["scores"]


def _prune(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    mask_grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    fresh: bool,
    costs: Sequence[int],
    scales: Sequence[float],
    budget: int,
    min_keep: int,
) -> Outputs:
    # Ties are cut in row-major order: with min_keep in any item, so then all walks are of that order.
    items = [
        host.as_item(
            weight,
            grads[i] if grads else None,
            masks[i],
            mask_grads[i] if mask_grads else None,
            min_keep > 0,
            costs[i],
            scales[i],
        )
        for i, weight in enumerate(weights)
    ]
    wide = bool(mask_grads) or any(weight.dtype == torch.float64 for weight in weights)
    with torch.cuda.device_of(weights[0]):
        outputs = _step(items, wide, fresh, budget, min_keep)
    torch.autograd.graph.increment_version([*weights, *masks])
    return outputs


def prune_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    mask_grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    fresh: bool,
    prune: int,
    min_keep: int,
) -> Outputs:
    """drive::prune_ for tensors on one GPU; for tensors on the CPU in Triton's interpreter."""
    check("drive::prune_", weights, grads, mask_grads, masks, prune, min_keep)
    ones = [1] * len(weights)
    keep = sum(weight.numel() for weight in weights) - prune
    return _prune(weights, grads, mask_grads, masks, fresh, ones, ones, keep, min_keep)


def prune_to_cost_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    mask_grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    fresh: bool,
    costs: Sequence[int],
    scales: Sequence[float],
    max_cost: int,
    min_keep: int,
) -> Outputs:
    """drive::prune_to_cost_, likewise."""
    op = "drive::prune_to_cost_"
    check(op, weights, grads, mask_grads, masks, 0, min_keep)
    check_costs(op, weights, costs, scales, max_cost)
    return _prune(weights, grads, mask_grads, masks, fresh, costs, scales, max_cost, min_keep)
