"""drive::shard_* - what one rank does for an exact global step over tensors that are spread over ranks.

drive::prune_ in pieces, between which the ranks add up their counts (python/drive/distributed.py tells the
algorithm). Scores and keys are those of drive::prune_ (prune.py, csrc/key.h): a key is 1 + the bits of
|score| as an integer, 0 for an entry that is pruned already. `wide` keys are of 64 bits, of float64 scores:
whether they are is a question to all tensors, and the ops are called with some.

All take the operands of drive::prune_, of which `masks` may be empty here: then nothing is pruned yet.
Positions are row-major within a tensor. Whatever is returned is small, or a fraction of the entries.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .prune import _library

_OPERANDS = (
    "Tensor[] weights, "  # theta, any shapes and strides
    "Tensor[] grads, "  # dL/dtheta; empty: |theta| is the score
    "Tensor[] mask_grads, "  # dL/dm; empty: theta * dL/dtheta
    "Tensor[] masks, "  # bool; empty: nothing is pruned
    "bool wide"
)
_library.define(
    f"shard_sample({_OPERANDS}, "
    "SymInt count"  # entries to look at, at most all: one out of each of so many equal parts
    ") -> Tensor"  # scores of those of them that are not pruned, float32 or float64
)
_library.define(
    f"shard_histogram({_OPERANDS}, "
    "int low, int shift, int buckets"  # bucket b holds the keys in low + [b, b + 1) * 2^shift
    ") -> Tensor"  # [buckets] int64
)
_library.define(
    f"shard_survey({_OPERANDS}, "
    "int low, int high, "  # keys of a bracket
    "SymInt room"  # scores strictly inside it that are listed, at most
    ") -> ("
    "Tensor counts, "  # [T, 6] int64: COUNTS
    "Tensor sums, "  # [T] float64: sum of |S| (Eq. 7)
    "Tensor inside, "  # scores strictly inside the bracket, tensor by tensor; nothing if there was no room
    "Tensor blocks)"  # [B, 2] int64, by block of BLOCK entries: where in `inside`, and how many
)
_library.define(
    f"shard_ties({_OPERANDS}, "  # of one tensor
    "int threshold, "
    "Tensor ends, "  # [E] int64, rising positions
    "Tensor? blocks"  # int64: blocks of BLOCK positions beside which there are no such keys; None: any
    ") -> Tensor"  # [E - 1, 2] int64: keys on the threshold between two ends; if that is one, its position
)
_library.define(
    "shard_apply_(Tensor(a!)[] weights, Tensor[] grads, Tensor[] mask_grads, Tensor(b!)[] masks, "
    "bool fresh, "  # the masks' contents are not read
    "bool wide, "
    "int[] thresholds, "  # by tensor: survivors have larger keys,
    "int[] tie_ends"  # or this key and a position before the end
    ") -> ()"
)
_library.define("checksum(Tensor input) -> Tensor")  # [] int64, of the bits and their positions, of any dtype

# Columns of shard_survey's counts: keys above, at and inside the bracket; not pruned; NaN or infinite.
COUNTS = ("above", "at_high", "inside", "at_low", "alive", "nonfinite")

BLOCK = 1 << 16

_PIECE = 1 << 20  # entries that the references look at together: their temporaries stay small


class Operands(NamedTuple):
    """The arguments that all of these ops begin with."""

    weights: Sequence[Tensor]
    grads: Sequence[Tensor]
    mask_grads: Sequence[Tensor]
    masks: Sequence[Tensor]
    wide: bool

    def each(self, change: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> "Operands":
        """With each list changed."""
        weights, grads, mask_grads, masks = map(change, self.lists)
        return Operands(weights, grads, mask_grads, masks, self.wide)

    @property
    def lists(self) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        """All but `wide`."""
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
    weights, grads, mask_grads, masks, wide = operands
    dtype = torch.float64 if wide else torch.float32
    rows = [list_[index].detach().flatten() for list_ in (weights, mask_grads, grads) if list_]
    mask = masks[index].flatten() if masks else None
    end = rows[0].numel() if end is None else end
    for start in range(begin, end, _PIECE):
        here = slice(start, min(end, start + _PIECE))
        scores = rows[0][here].to(dtype)
        for row in rows[1:]:
            scores = scores * row[here].to(dtype)
        scores = scores.abs()
        alive = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask[here]
        keys = scores.view(torch.int64 if wide else torch.int32) + 1
        yield Piece(start, scores, alive, torch.where(alive, keys, 0).long())


def sample_reference(
    weights: Sequence[Tensor], grads: Sequence[Tensor], mask_grads: Sequence[Tensor], masks: Sequence[Tensor],
    wide: bool, count: int,
) -> Tensor:  # fmt: skip
    """What drive::shard_sample means; which entry of a part is looked at is an implementation's choice."""
    operands = Operands(weights, grads, mask_grads, masks, wide)
    total = sum(w.numel() for w in weights)
    step = max(1, total // max(1, count))
    found, offset = [], 0
    for index, weight in enumerate(weights):
        for piece in _pieces(operands, index):
            skipped = -(offset + piece.begin) % step
            found.append(piece.scores[skipped::step][piece.alive[skipped::step]])
        offset += weight.numel()
    return torch.cat(found)[:count] if found else torch.empty(0)


def histogram_reference(
    weights: Sequence[Tensor], grads: Sequence[Tensor], mask_grads: Sequence[Tensor], masks: Sequence[Tensor],
    wide: bool, low: int, shift: int, buckets: int,
) -> Tensor:  # fmt: skip
    """What drive::shard_histogram means, in plain PyTorch."""
    operands = Operands(weights, grads, mask_grads, masks, wide)
    counts = torch.zeros(buckets, dtype=torch.int64, device=weights[0].device)
    for index in range(len(weights)):
        for piece in _pieces(operands, index):
            bucket = (piece.keys[piece.keys >= low] - low) >> shift
            counts += torch.bincount(bucket[bucket < buckets], minlength=buckets)
    return counts


def survey_reference(
    weights: Sequence[Tensor], grads: Sequence[Tensor], mask_grads: Sequence[Tensor], masks: Sequence[Tensor],
    wide: bool, low: int, high: int, room: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What drive::shard_survey means, in plain PyTorch."""
    operands = Operands(weights, grads, mask_grads, masks, wide)
    counts = torch.zeros(len(weights), len(COUNTS), dtype=torch.int64, device=weights[0].device)
    sums = torch.zeros(len(weights), dtype=torch.float64, device=weights[0].device)
    listed = [sums.new_empty(0, dtype=torch.float64 if wide else torch.float32)]
    per_block: list[Tensor] = []
    for index in range(len(weights)):
        for _, scores, alive, keys in _pieces(operands, index):
            inside = (keys > low) & (keys < high)
            columns = keys > high, keys == high, inside, keys == low, alive, alive & ~scores.isfinite()
            counts[index] += torch.stack([column.sum() for column in columns])
            living = torch.where(alive, scores, 0).double()
            sums[index] += (living.square() if grads and not mask_grads else living).sum()
            listed.append(scores[inside])
            per_block += [part.sum() for part in inside.split(BLOCK)]
    lengths = torch.stack(per_block) if per_block else counts.new_empty(0)
    blocks = torch.stack([lengths.cumsum(0) - lengths, lengths], 1)
    found = torch.cat(listed)
    return counts, sums, found if len(found) <= room else found[:0], blocks


def ties_reference(
    weights: Sequence[Tensor], grads: Sequence[Tensor], mask_grads: Sequence[Tensor], masks: Sequence[Tensor],
    wide: bool, threshold: int, ends: Tensor, blocks: Tensor | None,
) -> Tensor:  # fmt: skip
    """What drive::shard_ties means, in plain PyTorch."""
    operands = Operands(weights, grads, mask_grads, masks, wide)
    before = ends.new_zeros(len(ends), 2)  # how many before an end, and the sum of their positions
    for piece in _pieces(operands, 0, int(ends[0]), int(ends[-1])):
        ties = piece.keys == threshold
        position = torch.arange(piece.begin, piece.begin + len(ties), device=ties.device)
        if blocks is not None:
            ties &= torch.isin(position // BLOCK, blocks)
        seen = torch.stack([ties, torch.where(ties, position, 0)], 1).cumsum(0)
        seen = torch.nn.functional.pad(seen, (0, 0, 1, 0))
        before += seen[(ends - piece.begin).clamp(0, piece.keys.numel())]
    counts, positions = before.diff(dim=0).unbind(1)
    return torch.stack([counts, torch.where(counts == 1, positions, 0)], 1)


@torch.no_grad()
def apply_reference(
    weights: Sequence[Tensor], grads: Sequence[Tensor], mask_grads: Sequence[Tensor], masks: Sequence[Tensor],
    fresh: bool, wide: bool, thresholds: Sequence[int], tie_ends: Sequence[int],
) -> None:  # fmt: skip
    """What drive::shard_apply_ means, in plain PyTorch."""
    operands = Operands(weights, grads, mask_grads, [] if fresh else masks, wide)
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


def checksum_reference(input: Tensor) -> Tensor:
    """What drive::checksum means: the sum of bits * (a multiplier of the position), scrambled, modulo 2^64.

    Multipliers are scattered over 64 bits, so that the differences of two tensors do not add up to 0; entries
    of 8 bytes are two of 4, so that no bit is pushed out of the sum. The sum is scrambled (csrc/sampling.h),
    so that the checksums of several tensors do not add up as the tensors do.
    """
    bits = input.detach().flatten().view(_BITS[input.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=input.device)
    for begin in range(0, bits.numel(), _PIECE):
        part = bits[begin : begin + _PIECE].long()
        factor = torch.arange(begin + 1, begin + 1 + part.numel(), device=input.device) * _GOLDEN
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


def _sample_fake(weights: Sequence[Tensor], *rest: object) -> Tensor:
    wide = rest[3]
    size = torch.library.get_ctx().new_dynamic_size()
    return weights[0].new_empty(size, dtype=torch.float64 if wide else torch.float32)


def _histogram_fake(weights: Sequence[Tensor], *rest: int) -> Tensor:
    return weights[0].new_empty(rest[-1], dtype=torch.int64)


def _survey_fake(weights: Sequence[Tensor], *rest: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counts = weights[0].new_empty(len(weights), len(COUNTS), dtype=torch.int64)
    sums = weights[0].new_empty(len(weights), dtype=torch.float64)
    blocks = counts.new_empty(sum((w.numel() + BLOCK - 1) // BLOCK for w in weights), 2)
    return counts, sums, _sample_fake(weights, *rest), blocks


def _ties_fake(weights: Sequence[Tensor], *rest: Tensor) -> Tensor:
    ends = rest[-2]
    return ends.new_empty(ends.shape[0] - 1, 2)


def _apply_fake(*_: object) -> None:
    return None


def _checksum_fake(input: Tensor) -> Tensor:
    return input.new_empty((), dtype=torch.int64)


for _name, _fake, _reference in (
    ("shard_sample", _sample_fake, sample_reference),
    ("shard_histogram", _histogram_fake, histogram_reference),
    ("shard_survey", _survey_fake, survey_reference),
    ("shard_ties", _ties_fake, ties_reference),
    ("shard_apply_", _apply_fake, apply_reference),
    ("checksum", _checksum_fake, checksum_reference),
):
    torch.library.register_fake(f"drive::{_name}", _fake, lib=_library)
    _library.impl(_name, _reference, "CompositeExplicitAutograd")
