"""drive::shard_* - what one rank does for an exact global step over tensors that are spread over ranks.

drive::prune_ in pieces, between which the ranks add up their counts (drive/distributed/step.py tells the
algorithm). Scores and keys are those of drive::prune_ (prune.py, csrc/prune/key.h): a key is 1 + the bits of
|score| as an integer, 0 for an entry that is pruned already. `wide` keys are of 64 bits, of float64 scores:
whether they are is a question to all tensors, and the ops are called with some.

All take the operands of drive::prune_. Where masks are fresh, nothing is pruned yet and their contents are
not read; the ops that only read may have none. Positions are row-major within a tensor. Whatever is returned
is small, or a fraction of the entries, and of a size that the arguments tell: no op waits for a device.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drive_kernels.library import library, serve

_OPERANDS = (
    "Tensor[] weights, "  # theta, any shapes and strides
    "Tensor[] grads, "  # dL/dtheta; empty: |theta| is the score
    "Tensor[] mask_grads, "  # dL/dm; empty: theta * dL/dtheta
    "Tensor[] masks, "  # bool; empty, if they are fresh
    "bool fresh, "  # nothing is pruned
    "bool wide, "
    "float[] scales"  # of each tensor's scores, as drive::prune_to_cost_ has them; empty: 1
)
_LISTED = (
    "Tensor? listed, "  # of a survey of this memory: what it lists counts; None: all that is not pruned
    "int[] tensors"  # of which of them
)
library.define(
    f"shard_sample({_OPERANDS}, "
    "SymInt count"  # entries to look at, at most all: one out of each of so many equal parts
    ") -> Tensor"  # [count] their scores, float32 or float64; 0 for a pruned one
)
library.define(
    f"shard_survey({_OPERANDS}, "
    "int low, int high, "  # keys of a bracket, 0 <= low < high
    "SymInt room"  # keys strictly inside it that are listed, at most
    ") -> ("
    "Tensor counts, "  # [6, T] int64: COUNTS
    "Tensor sum, "  # [] float64: of |S| (Eq. 7)
    "Tensor listed)"  # uint8: the keys strictly inside, as an implementation keeps them; some, without room
)
library.define(
    f"shard_histogram({_OPERANDS}, {_LISTED}, "
    "int low, int shift, int buckets"  # bucket b holds the keys in low + [b, b + 1) * 2^shift; 1 <= low
    ") -> Tensor"  # [buckets] int64; at most 2048
)
library.define(
    f"shard_split({_OPERANDS}, {_LISTED}, "
    "int[] thresholds"  # by one of `tensors`
    ") -> Tensor"  # [tensors, 2] int64: keys above its threshold, and on it
)
library.define(
    f"shard_ties({_OPERANDS}, {_LISTED}, "  # one tensor
    "int threshold, "
    "Tensor ends"  # [E] int64, rising positions
    ") -> Tensor"  # [E - 1] int64: keys on the threshold between two ends
)
library.define(
    "shard_apply_(Tensor(a!)[] weights, Tensor[] grads, Tensor[] mask_grads, Tensor(b!)[] masks, "
    "bool fresh, "  # the masks' contents are not read
    "bool wide, "
    "float[] scales, "
    "Tensor? listed, "  # of a survey of this memory, if all thresholds are strictly inside its bracket
    "int[] thresholds, "  # by tensor: survivors have larger keys,
    "int[] tie_ends"  # or this key and a position before the end
    ") -> ()"
)
# [N] int64, of the bits and their positions; of any dtypes
library.define("checksum(Tensor[] inputs) -> Tensor")

# Rows of shard_survey's counts: keys above, at and inside the bracket, of what is not pruned; all that is
# not pruned; and of that, NaN or infinite.
COUNTS = ("above", "at_high", "inside", "at_low", "alive", "nonfinite")

_PIECE = 1 << 20  # entries that the references look at together: their temporaries stay small


class Operands(NamedTuple):
    """The arguments that all of these ops begin with."""

    weights: Sequence[Tensor]
    grads: Sequence[Tensor]
    mask_grads: Sequence[Tensor]
    masks: Sequence[Tensor]
    fresh: bool
    wide: bool
    scales: Sequence[float]

    def each(self, change: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> "Operands":
        """With each list changed."""
        weights, grads, mask_grads, masks = map(change, self.lists)
        return Operands(weights, grads, mask_grads, masks, self.fresh, self.wide, self.scales)

    @property
    def lists(self) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        """The tensors."""
        return self.weights, self.grads, self.mask_grads, self.masks


class Piece(NamedTuple):
    """Some neighbouring entries of one tensor."""

    begin: int  # position of the first one
    scores: Tensor  # |score|, of float32 or float64
    alive: Tensor  # bool
    keys: Tensor  # int64


def top_key(wide: bool) -> int:
    """Larger than the key of any finite score."""
    return 1 + (0x7FF0_0000_0000_0000 if wide else 0x7F80_0000)


def _pieces(operands: Operands, index: int, begin: int = 0, end: int | None = None) -> Iterator[Piece]:
    weights, grads, mask_grads, masks, fresh, wide, scales = operands
    dtype = torch.float64 if wide else torch.float32
    scale = float(torch.tensor(scales[index], dtype=torch.float32)) if scales else 1.0
    # with two operands, the gradient is scaled; else the product
    lists = (grads, weights) if grads and not mask_grads else (weights, mask_grads, grads)
    rows = [list_[index].detach().flatten() for list_ in lists if list_]
    scaled = rows[0] if len(rows) == 2 else rows[-1]
    mask = None if fresh else masks[index].flatten()
    end = rows[0].numel() if end is None else end
    for start in range(begin, end, _PIECE):
        here = slice(start, min(end, start + _PIECE))
        scores = torch.ones((), dtype=dtype)
        for row in rows:
            scores = scores * row[here].to(dtype)
            if row is scaled:
                scores = scores * scale
        scores = scores.abs()
        alive = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask[here]
        keys = scores.view(torch.int64 if wide else torch.int32) + 1
        yield Piece(start, scores, alive, torch.where(alive, keys, 0).long())


def _counting(keys: Tensor, listed: Tensor | None) -> Tensor:
    """bool: is it listed, or not pruned? What the reference leaves of a survey is its bracket."""
    if listed is None:
        return keys != 0
    bracket = listed.view(torch.int64)
    return (keys > bracket[0]) & (keys < bracket[1])


def sample_reference(
    weights: Sequence[Tensor], grads: Sequence[Tensor], mask_grads: Sequence[Tensor], masks: Sequence[Tensor],
    fresh: bool, wide: bool, scales: Sequence[float], count: int,
) -> Tensor:  # fmt: skip
    """What drive::shard_sample means; which entry of a part is looked at is an implementation's choice."""
    operands = Operands(weights, grads, mask_grads, masks, fresh, wide, scales)
    step = max(1, sum(w.numel() for w in weights) // max(1, count))
    found, offset = [], 0
    for index, weight in enumerate(weights):
        for piece in _pieces(operands, index):
            sampled = slice(-(offset + piece.begin) % step, None, step)
            found.append(torch.where(piece.alive[sampled], piece.scores[sampled], 0))
        offset += weight.numel()
    found.append(weights[0].new_empty(0, dtype=torch.float64 if wide else torch.float32))
    return torch.cat(found)[:count]


def survey_reference(
    weights: Sequence[Tensor], grads: Sequence[Tensor], mask_grads: Sequence[Tensor], masks: Sequence[Tensor],
    fresh: bool, wide: bool, scales: Sequence[float], low: int, high: int, room: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What drive::shard_survey means, in plain PyTorch."""
    operands = Operands(weights, grads, mask_grads, masks, fresh, wide, scales)
    counts = torch.zeros(len(COUNTS), len(weights), dtype=torch.int64, device=weights[0].device)
    total = torch.zeros((), dtype=torch.float64, device=weights[0].device)
    listed = torch.tensor([low, high], device=weights[0].device).view(torch.uint8)
    for index in range(len(weights)):
        for _, scores, alive, keys in _pieces(operands, index):
            inside, at_low = _counting(keys, listed), alive & (keys == low)
            rows = keys > high, keys == high, inside, at_low, alive, alive & ~scores.isfinite()
            counts[:, index] += torch.stack([row.sum() for row in rows])
            living = torch.where(alive, scores, 0).double()
            total += (living.square() if grads and not mask_grads else living).sum()
    return counts, total, listed


def histogram_reference(
    weights: Sequence[Tensor], grads: Sequence[Tensor], mask_grads: Sequence[Tensor], masks: Sequence[Tensor],
    fresh: bool, wide: bool, scales: Sequence[float],
    listed: Tensor | None, tensors: Sequence[int], low: int, shift: int, buckets: int,
) -> Tensor:  # fmt: skip
    """What drive::shard_histogram means, in plain PyTorch."""
    operands = Operands(weights, grads, mask_grads, masks, fresh, wide, scales)
    counts = torch.zeros(buckets, dtype=torch.int64, device=weights[0].device)
    for index in tensors:
        for piece in _pieces(operands, index):
            bucket = (piece.keys - low)[_counting(piece.keys, listed) & (piece.keys >= low)] >> shift
            counts += torch.bincount(bucket[bucket < buckets], minlength=buckets)
    return counts


def split_reference(
    weights: Sequence[Tensor], grads: Sequence[Tensor], mask_grads: Sequence[Tensor], masks: Sequence[Tensor],
    fresh: bool, wide: bool, scales: Sequence[float],
    listed: Tensor | None, tensors: Sequence[int], thresholds: Sequence[int],
) -> Tensor:  # fmt: skip
    """What drive::shard_split means, in plain PyTorch."""
    operands = Operands(weights, grads, mask_grads, masks, fresh, wide, scales)
    counts = torch.zeros(len(tensors), 2, dtype=torch.int64, device=weights[0].device)
    for row, index, threshold in zip(counts, tensors, thresholds, strict=True):
        for piece in _pieces(operands, index):
            keys = piece.keys[_counting(piece.keys, listed)]
            row += torch.stack([(keys > threshold).sum(), (keys == threshold).sum()])
    return counts


def ties_reference(
    weights: Sequence[Tensor], grads: Sequence[Tensor], mask_grads: Sequence[Tensor], masks: Sequence[Tensor],
    fresh: bool, wide: bool, scales: Sequence[float],
    listed: Tensor | None, tensors: Sequence[int], threshold: int, ends: Tensor,
) -> Tensor:  # fmt: skip
    """What drive::shard_ties means, in plain PyTorch."""
    operands = Operands(weights, grads, mask_grads, masks, fresh, wide, scales)
    before = torch.zeros_like(ends)  # how many before an end
    for piece in _pieces(operands, tensors[0], int(ends[0]), int(ends[-1])):
        ties = _counting(piece.keys, listed) & (piece.keys == threshold)
        seen = torch.nn.functional.pad(ties.cumsum(0), (1, 0))
        before += seen[(ends - piece.begin).clamp(0, piece.keys.numel())]
    return before.diff()


@torch.no_grad()
def apply_reference(
    weights: Sequence[Tensor], grads: Sequence[Tensor], mask_grads: Sequence[Tensor], masks: Sequence[Tensor],
    fresh: bool, wide: bool, scales: Sequence[float],
    listed: Tensor | None, thresholds: Sequence[int], tie_ends: Sequence[int],
) -> None:  # fmt: skip
    """What drive::shard_apply_ means, in plain PyTorch; what is listed only spares other implementations."""
    operands = Operands(weights, grads, mask_grads, masks, fresh, wide, scales)
    for index, (weight, mask) in enumerate(zip(weights, masks, strict=True)):
        keep = torch.empty(weight.numel(), dtype=torch.bool, device=weight.device)
        for begin, _, _, keys in _pieces(operands, index):
            here = keep[begin : begin + keys.numel()]
            torch.gt(keys, thresholds[index], out=here)
            ties = max(0, min(tie_ends[index] - begin, keys.numel()))
            here[:ties] |= keys[:ties] == thresholds[index]
        mask.copy_(keep.view(mask.shape))
        weight.detach().masked_fill_(~mask, 0)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


def checksum_reference(inputs: Sequence[Tensor]) -> Tensor:
    """What drive::checksum means, in plain PyTorch."""
    return torch.stack([_checksum(tensor) for tensor in inputs])


def _checksum(tensor: Tensor) -> Tensor:
    """The sum of bits * (a multiplier of the position), scrambled, modulo 2^64.

    Multipliers are scattered over 64 bits, so that the differences of two tensors do not add up to 0; entries
    of 8 bytes are two of 4, so that no bit is pushed out of the sum. The sum is scrambled (prune/sampling.h),
    so that the checksums of several tensors do not add up as the tensors do.
    """
    bits = tensor.detach().flatten().view(_BITS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for begin in range(0, bits.numel(), _PIECE):
        part = bits[begin : begin + _PIECE].long()
        factor = torch.arange(begin + 1, begin + 1 + part.numel(), device=tensor.device) * _GOLDEN
        total += (part * (factor ^ _shifted(factor, 32))).sum()
    total += _GOLDEN
    total = (total ^ _shifted(total, 30)) * _signed(0xBF58476D1CE4E5B9)
    total = (total ^ _shifted(total, 27)) * _signed(0x94D049BB133111EB)
    return total ^ _shifted(total, 31)


def _signed(number: int) -> int:
    """The int64 of the same bits."""
    return number - ((number >> 63) << 64)


def _shifted(numbers: Tensor, by: int) -> Tensor:
    """To the right, without the sign."""
    return (numbers >> by) & ((1 << (64 - by)) - 1)


_GOLDEN = _signed(0x9E3779B97F4A7C15)


def _sample_fake(weights: Sequence[Tensor], *rest: Any) -> Tensor:
    *_, wide, _, count = rest
    return weights[0].new_empty(count, dtype=torch.float64 if wide else torch.float32)


def _survey_fake(weights: Sequence[Tensor], *_: object) -> tuple[Tensor, Tensor, Tensor]:
    counts = weights[0].new_empty(len(COUNTS), len(weights), dtype=torch.int64)
    size = torch.library.get_ctx().new_dynamic_size()  # an implementation's choice
    return counts, counts.new_empty((), dtype=torch.float64), counts.new_empty(size, dtype=torch.uint8)


def _histogram_fake(weights: Sequence[Tensor], *rest: Any) -> Tensor:
    return weights[0].new_empty(rest[-1], dtype=torch.int64)


def _split_fake(weights: Sequence[Tensor], *rest: Any) -> Tensor:
    return weights[0].new_empty(len(rest[-1]), 2, dtype=torch.int64)


def _ties_fake(weights: Sequence[Tensor], *rest: Any) -> Tensor:
    ends = rest[-1]
    return weights[0].new_empty(ends.shape[0] - 1, dtype=torch.int64)


def _apply_fake(*_: object) -> None:
    return None


def _checksum_fake(inputs: Sequence[Tensor]) -> Tensor:
    return inputs[0].new_empty(len(inputs), dtype=torch.int64)


for _name, _fake, _reference in (
    ("shard_sample", _sample_fake, sample_reference),
    ("shard_survey", _survey_fake, survey_reference),
    ("shard_histogram", _histogram_fake, histogram_reference),
    ("shard_split", _split_fake, split_reference),
    ("shard_ties", _ties_fake, ties_reference),
    ("shard_apply_", _apply_fake, apply_reference),
    ("checksum", _checksum_fake, checksum_reference),
):
    serve(_name, _fake, _reference)
