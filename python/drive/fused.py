"""fused_drive_prune: one exact global pruning step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import drive_kernels  # noqa: F401  (defines torch.ops.drive)

from ._scoring.ties import warn_of_ties
from .distributed.placement import distributed_like, is_dtensor, local
from .distributed.shards import Shards
from .distributed.step import sharded_step
from .distributed.team import Said, Team, sent, team_of, together
from .holding.zero import zero_pruned_
from .layers import Layers, Weight
from .masks import Masks
from .result import PruneResult
from .targets.choice import Include, Target
from .targets.matrices import cut, entries
from .targets.structures import axes_of
from .targets.targets import Operands, Tensors, operands

PruneOp = Callable[..., tuple[Tensor, Tensor, Tensor]]


def fused_drive_prune(
    target: Target,
    grads: Tensors | None = None,
    mask_grads: Tensors | None = None,
    *,
    sparsity: float,
    masks: Masks | None = None,
    min_keep: int = 0,
    include: Include | None = None,
    exclude: Include | None = None,
    layers: Layers | None = None,
    process_group: dist.ProcessGroup | None = None,
    check_finite: bool = True,
) -> PruneResult:
    """Prune to `sparsity` by the DRIVE score, globally and exactly; weights and masks in place.

    The score of an entry is |theta * dL/dm * dL/dtheta| (arXiv 2404.03687, Eq. 6), normalised by its
    sum (Eq. 7). Afterwards exactly `round(sparsity * total)` entries are zero and masked (or as many
    as `masks` had pruned before, if those were more). Among equal scores the lower global index
    (order of the tensors, then row-major index) survives; pruned entries never come back. The masks
    are the same bit for bit on every backend and with any number of threads. If anything raises,
    weights, masks and gradients are as they were. Where entries of score 0 survive and others do not, the
    logger `drive._scoring.ties` says so once a model (with `check_finite`).

    Tensors that are spread over ranks are pruned as one tensor each, to the same masks as in one process,
    while some kilobytes travel (docs/scaling.md). All ranks must call this together, for
        DTensors (FSDP2, tensor parallelism): Shard and Replicate on any mesh; their masks are DTensors too;
        a model wrapped in DistributedDataParallel, or plain tensors beside DTensors: equal on all ranks,
            which is checked;
        plain tensors with a `process_group`: each rank's rows of larger ones, in the order of the ranks.

    Args:
        target: a module, a mapping of names to tensors, or a sequence of tensors; float32,
            bfloat16, float16 (freely mixed) or float64, any shapes and strides, on one device.
            A tensor that appears twice (tied weights) counts once, under its first name.
        grads: dL/dtheta, same structure as `target` (or a mapping by parameter name), shape and
            dtype of the weights. Default: each tensor's `.grad`.
        mask_grads: dL/dm, likewise. Default: theta * dL/dtheta, which is exact when both gradients
            come from the same batch and weights; scores are then ranked by |float32(theta * grad)|.
            If given, scores are ranked by the product of the three in float64.
        sparsity: final fraction of zeros over all prunable entries, 0 <= sparsity < 1.
        masks: masks to update in place, of the same names and shapes; False entries stay pruned.
        min_keep: survivors that every tensor keeps at least (all it has, if those are fewer); in a module
            every matrix of it: every expert, group of a convolution, gate, and q, k and v (docs/layers.md).
            Equal scores are then ordered matrix by matrix.
        include: which tensors: a predicate (name, module, tensor) -> bool, or names, of which those with
            wildcards ("encoder.*") choose among weights. Default: of a mapping or sequence everything; of a
            module the weights of all layer types that are known (docs/layers.md), but for frozen ones,
            embeddings and heads tied to them, and the factors of adapters.
        exclude: what not, of these: likewise a predicate or names.
        layers: layer types of one's own for this call, as `drive.register_layer` takes them for all.
        process_group: the ranks that hold the other shards; DTensors on all ranks need none. Of plain tensors
            `min_keep` counts per tensor.
        check_finite: raise if a score is not finite. False: no host synchronisation (but for tensors that
            are spread over ranks); a non-finite score then makes the step a no-op and `result.ok` False.

    Returns:
        PruneResult, with the masks and the counts.

    Raises:
        ValueError: sparsity or min_keep out of range; a missing or misshapen gradient or mask; an
            empty selection; a non-finite score.
        TypeError: an argument or tensor of the wrong type or dtype.
        RuntimeError: another rank raised an error, or did not come.
    """
    op = "fused_drive_prune"
    team = team_of(op, target, process_group)
    return prune_step(
        torch.ops.drive.prune_, op, target, grads, mask_grads, sparsity=sparsity, masks=masks,
        min_keep=min_keep, include=include, exclude=exclude, layers=layers, check_finite=check_finite,
        team=team,
    )  # fmt: skip


def prune_step(
    prune_op: PruneOp,
    op: str,
    target: Target,
    grads: Tensors | None,
    mask_grads: Tensors | None,
    *,
    sparsity: float,
    masks: Masks | None,
    min_keep: int,
    include: Include | None,
    exclude: Include | None,
    layers: Layers | None,
    check_finite: bool,
    team: Team | None = None,
) -> PruneResult:
    """Check the arguments, call `prune_op` (any implementation of drive::prune_), wrap its result.

    On a team, `prune_op` is not called: drive::shard_* take the step.
    """
    with together(team, "check their arguments") as said:
        check_sparsity(op, sparsity)
        found = operands(target, grads, mask_grads, include, exclude, layers, op)
        axes = axes_of(target, found.weights, layers) if min_keep and isinstance(target, nn.Module) else {}
        step = Step(op, found, masks, min_keep, team, axes)
        said += [("sparsity", float(sparsity)), *step.said]
    sizes = step.meet()
    return step.take(prune_op, sizes, round(sparsity * sum(sizes.values())), check_finite)


class Step:
    """A step whose tensors and masks fit together on this rank."""

    def __init__(
        self,
        op: str,
        found: Operands,
        masks: Masks | None,
        min_keep: int,
        team: Team | None,
        axes: Mapping[str, Weight],
    ) -> None:
        """
        Args:
            op: for the error messages.
            found: what to prune, by what.
            masks, min_keep: of `fused_drive_prune`.
            team: the ranks that take it together; None: this process alone.
            axes: how layers multiply by the weights: those that are several matrices keep `min_keep` of each.

        Raises:
            ValueError, TypeError: a mask that does not fit, a bad `min_keep`, DTensors without a team.
        """
        if not isinstance(min_keep, int) or isinstance(min_keep, bool) or min_keep < 0:
            raise ValueError(f"{op}: min_keep must be an integer >= 0, got {min_keep!r}")
        if team is None and any(map(is_dtensor, found.weights.values())):
            raise TypeError(f"{op}: tensors must be plain ones, got a DTensor")
        self._op, self._found, self._min_keep, self._fresh = op, found, min_keep, masks is None
        self._axes = {name: axes.get(name, Weight()) for name in found.weights}
        masks = new_masks(found.weights) if masks is None else masks
        masks.check_match(op, found.weights)
        self._masks = [masks[name] for name in found.weights]
        self._shards = None if team is None else Shards(team, found.weights)

    @property
    def said(self) -> Said:
        """What must be the same on all ranks before they `meet`."""

        def given(whether: bool) -> str:
            return "given" if whether else "none"

        return [
            *([] if self._shards is None else self._shards.said),
            ("min_keep", self._min_keep),
            ("masks", given(not self._fresh)),
            ("gradients", given(bool(self._found.grads))),
            ("mask gradients", given(bool(self._found.mask_grads))),
        ]

    def meet(self) -> dict[str, int]:
        """Entries of each tensor, on all ranks, which must all ask."""
        weights, shards = self._found.weights, self._shards
        shapes = {name: weight.shape for name, weight in weights.items()} if shards is None else shards.meet()
        whole = not self._min_keep or (shards is not None and shards.team.rows)
        self._matrices = cut(shapes, {name: Weight() for name in shapes} if whole else self._axes)
        return {name: shape.numel() for name, shape in shapes.items()}

    @torch.no_grad()
    def take(
        self, prune_op: PruneOp, sizes: Mapping[str, int], prune: int, check_finite: bool
    ) -> PruneResult:
        """Prune so many entries in all, after the ranks have met.

        Raises:
            ValueError: `min_keep` asks for more survivors than there are; a non-finite score.
        """
        op, found, shards = self._op, self._found, self._shards
        _check_counts(op, self._min_keep, prune, [entries(box) for _, box in self._matrices])
        weights = list(found.weights.values())
        lists = found.scores or weights, found.grads, found.mask_grads, self._masks
        tensors = [[local(tensor) for tensor in some] for some in lists]
        places = self._matrices
        apart = len(places) > len(weights)
        if apart:
            if shards is not None:
                shards, places = shards.cut(places)
            tensors = [[some[t][place] for t, place in places] if some else [] for some in tensors]
        arguments: Any = (*tensors, self._fresh, prune, self._min_keep)
        bad_ranks: list[int] | None = None
        if shards is None:
            kept, nonfinite, scores = prune_op(*arguments)
        else:
            kept, nonfinite, scores, bad_ranks = sharded_step(shards, *arguments)
        if apart:
            of = sent(torch.tensor([t for t, _ in places]), kept.device)
            kept, nonfinite = (kept.new_zeros(len(weights)).index_add_(0, of, n) for n in (kept, nonfinite))
            if bad_ranks is not None:
                firsts = zip(places, bad_ranks, strict=True)
                bad_ranks = [
                    min(rank for _, rank in some) for _, some in groupby(firsts, lambda one: one[0][0])
                ]
        if found.scores is not None:  # the op has zeroed these
            zero_pruned_(zip(weights, self._masks, strict=True))
        torch.autograd.graph.increment_version(self._masks)  # which the op does not: copies are kept of them
        rows = shards is not None and shards.team.rows  # of models of which this rank sees its own part
        parameters = None if rows else found.parameters
        masks = Masks(dict(zip(found.weights, self._masks, strict=True)), parameters)
        result = PruneResult(masks, kept, nonfinite, scores, sizes, bad_ranks)
        if check_finite:
            weakest = scores.to("cpu", non_blocking=scores.is_cuda)  # travels with what is waited for anyway
            result.check_finite(op).answer()
            if weakest[0] == 0 and prune == result.pruned > 0:  # not more, by older masks
                warn_of_ties(op, weights)
        return result


def _check_counts(op: str, min_keep: int, prune: int, sizes: list[int]) -> None:
    total, guarded = sum(sizes), sum(min(min_keep, size) for size in sizes)
    if guarded > total - prune:
        raise ValueError(
            f"{op}: min_keep={min_keep} asks for {guarded} survivors, "
            f"{prune} pruned leave {total - prune} of {total}"
        )


def new_masks(weights: dict[str, Tensor]) -> Masks:
    """Masks to be written, in their weights' memory layouts.

    All in one piece of memory: page faults in many small ones take as long as the step itself. Each begins
    on 64 bytes, as the kernels' vectors do.
    """
    offsets, end = [], 0
    for weight in weights.values():
        offsets.append(end)
        end += (local(weight).numel() + 63) // 64 * 64
    room = torch.ops.drive.new_masks(local(next(iter(weights.values()))), end)
    masks = {}
    for (name, weight), offset in zip(weights.items(), offsets, strict=True):
        here = local(weight)
        stride = torch.empty_like(here, device="meta").stride()  # a slice's mask is dense
        masks[name] = distributed_like(room.as_strided(here.shape, stride, offset), weight)
    return Masks(masks)


def check_sparsity(op: str, sparsity: object) -> None:
    """Raise unless `sparsity` is a real number in [0, 1)."""
    if not isinstance(sparsity, Real) or isinstance(sparsity, bool):
        raise TypeError(f"{op}: sparsity must be a number in [0, 1), got {sparsity!r}")
    if not 0 <= float(sparsity) < 1:  # NaN neither
        raise ValueError(f"{op}: sparsity must be in [0, 1), got {sparsity}")
