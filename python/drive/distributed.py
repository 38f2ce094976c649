"""One exact global step over tensors that are spread over ranks: drive::prune_ with its counts added up.

Only counts travel, of sizes that do not depend on the number of entries; no rank sees another one's scores.

  1. Sample: the ranks look at some 2^14 of their entries. Two rounds of histograms of these keys bracket
     the threshold, low <= T <= high, as in csrc/prune.cpp.
  2. Survey (one pass over theta, G and an old mask): by tensor, how many keys lie above, at and inside the
     bracket; those inside, 1 to 4 % of all, are listed. Copies of one part on several ranks are counted
     once, and compared by a checksum. A non-finite score ends the step here, on all ranks.
  3. Threshold T, the k-th largest key: by radix selection among the listed keys, whose first histogram
     came with the survey. The counts prove that the bracket held; if it did not, among all keys, one pass
     a round.
  4. Ties: the first entries on the threshold survive, in the order of tensors and then row-major indices of
     the whole tensor. In the one tensor where they end, their last index is found by the same selection:
     among indices instead of keys, whoever holds them. If it is alone in its bucket, one round will do.
  5. Apply (one more pass), alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from drive_kernels.shards import BLOCK, COUNTS, Operands, top_key

from .copies import Copies
from .placement import Part
from .radix import Problem, bucketing, narrow, solve
from .shards import Shards

# As in csrc/sampling.h and csrc/sample.h, with the reasons
_SIGMAS = 5
_MIN_SAMPLE, _MAX_SAMPLE, _ENTRIES_PER_SAMPLE = 1 << 14, 1 << 16, 1 << 12
_ENTRIES_PER_LISTED = 16

_ABOVE, _AT_HIGH, _INSIDE, _AT_LOW, _ALIVE, _NONFINITE = range(len(COUNTS))


@dataclass
class _Choice:
    """Of some tensors, the entries above a threshold key survive, and the first `ties` on it."""

    tensors: list[int]
    threshold: int
    ties: int
    above: list[int]  # by tensor, on all ranks
    equal: list[int]

    def surviving_ties(self) -> list[int]:
        """By tensor: the first ones in the order of the tensors."""
        before = accumulate(self.equal, initial=0)
        return [max(0, min(equal, self.ties - seen)) for seen, equal in zip(before, self.equal, strict=False)]

    def kept(self) -> list[int]:
        """By tensor: its survivors on all ranks."""
        return [above + ties for above, ties in zip(self.above, self.surviving_ties(), strict=True)]


def sharded_step(
    shards: Shards,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    mask_grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    fresh: bool,
    prune: int,
    min_keep: int,
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """drive::prune_ for the parts of one rank: its arguments, and its outputs, those of all ranks together.

    Returns:
        kept, nonfinite, scores: as drive::prune_'s.
        bad_ranks: [T] the first rank with a non-finite score; the team's size where there is none.

    Raises:
        ValueError: copies of a part differ.
        RuntimeError: another rank did not come.
    """
    wide = bool(mask_grads) or any(w.dtype == torch.float64 for w in weights)
    operands = Operands(weights, grads, mask_grads, [] if fresh else masks, wide)
    keep = sum(part.numel for part in shards.parts.values()) - prune
    plan = _Plan(shards, operands, keep)
    bad_ranks = [shards.team.size] * len(weights)
    if not plan.nonfinite.any():
        chosen = plan.choose(keep, min_keep)
        thresholds, tie_ends = plan.cuts(chosen)
        torch.ops.drive.shard_apply_(weights, grads, mask_grads, masks, fresh, wide, thresholds, tie_ends)
        kept, scores = plan.kept(chosen), plan.scores(chosen)
    else:
        bad_ranks = plan.bad_ranks()
        if fresh:
            for mask in masks:
                mask.fill_(True)
        kept, scores = plan.alive, torch.full((2,), torch.nan, dtype=torch.float64)
    device = weights[0].device
    return kept.to(device), plan.nonfinite.to(device), scores.to(device), bad_ranks


class _Plan:
    """Steps 1 to 4: decides everything, writes nothing."""

    def __init__(self, shards: Shards, operands: Operands, keep: int):
        self._team, self._parts = shards.team, list(shards.parts.values())
        self._own = _owned(operands, self._parts)
        self._top = top_key(operands.wide)
        self._squared = bool(operands.grads) and not operands.mask_grads

        entries = sum(w.numel() for w in self._own.weights)
        self._low, self._high = self._bracket(entries, keep)
        self._room = max(entries // _ENTRIES_PER_LISTED, _MIN_SAMPLE)
        counts, sums, inside, self._blocks = torch.ops.drive.shard_survey(
            *self._own, self._low, self._high, self._room
        )
        counts = counts.cpu()
        listed = counts[:, _INSIDE]
        overflow = int(listed.sum()) > self._room
        self._listed = [] if overflow else list(inside.split(listed.tolist()))
        self._bad_here = counts[:, _NONFINITE] > 0
        copies = Copies(operands, shards)
        self._shift, size = bucketing(self._low + 1, self._high - 1)
        histogram = torch.zeros(size)
        if not overflow:
            every = self._list(list(range(len(self._parts))))
            histogram = torch.ops.drive.shard_histogram(*every, self._low + 1, self._shift, size).cpu()

        # in one piece, as float64: whole numbers below 2^53 add up exactly in any order
        table = torch.cat([counts, copies.evidence], 1)
        mine = [table.flatten(), torch.tensor([overflow]), sums.sum(0, keepdim=True).cpu(), histogram]
        found = self._team.sum(torch.cat([part.double() for part in mine]), "count scores")
        found_table, overflows, score_sum, self._first = found.split([len(part) for part in mine])
        self._complete, self._sum = not overflows, float(score_sum)
        counted: Tensor = found_table.long().view_as(table)
        self._counts = counted[:, : len(COUNTS)]
        copies.check(counted[:, len(COUNTS) :])

    @property
    def nonfinite(self) -> Tensor:
        """[T] NaN or infinite scores, on all ranks."""
        return self._counts[:, _NONFINITE]

    def bad_ranks(self) -> list[int]:
        """By tensor: the first rank with a NaN or infinite score; the team's size where there is none."""
        last = self._team.size
        found = torch.where(self._bad_here, last - self._team.rank, 0)
        return (last - self._team.largest(found, "find non-finite scores")).tolist()

    @property
    def alive(self) -> Tensor:
        """[T] entries that are not pruned yet, on all ranks."""
        return self._counts[:, _ALIVE]

    def choose(self, keep: int, min_keep: int) -> list[_Choice]:
        """(Step 3) What survives: `keep` entries in all, of each tensor `min_keep` or all it has."""
        free = list(range(len(self._parts)))
        chosen: list[_Choice] = []
        guards = self.alive.clamp(max=min_keep).tolist()
        while True:
            choice = self._select(free, keep)
            # A tensor below its guard keeps exactly its min_keep best: what it gains, the others lose, so
            # the threshold for them only rises, and no such tensor can rise above its guard again.
            short = [t for t, kept in zip(free, choice.kept(), strict=True) if kept < guards[t]]
            if not short:
                return [*chosen, choice]
            chosen += self._select_each(short, [guards[t] for t in short])
            keep -= sum(guards[t] for t in short)
            free = [t for t in free if t not in set(short)]

    def cuts(self, chosen: list[_Choice]) -> tuple[list[int], list[int]]:
        """(Step 4) By tensor: the threshold, and the position here at which the ties on it end to survive."""
        thresholds, tie_ends = [self._top] * len(self._parts), [0] * len(self._parts)
        problems: list[Problem] = []
        cut: list[int] = []
        for choice in chosen:
            for t, ties, equal in zip(choice.tensors, choice.surviving_ties(), choice.equal, strict=True):
                thresholds[t] = choice.threshold
                if ties == equal:
                    tie_ends[t] = math.prod(self._parts[t].sizes)
                elif ties:
                    cut.append(t)
                    problems.append(Problem(equal - ties + 1, 0, math.prod(self._parts[t].shape) - 1))

        def count(problem: int, low: int, shift: int, buckets: int) -> Tensor:
            t = cut[problem]
            part, weight = self._parts[t], self._own.weights[t]
            bounds = low + (torch.arange(buckets + 1) << shift)
            ends = part.positions(bounds.clamp(max=math.prod(part.shape)))
            found = torch.zeros(2, buckets, dtype=torch.int64)
            if weight.numel():
                operands = _some(self._own, [t])
                ties = torch.ops.drive.shard_ties(
                    *operands, thresholds[t], ends.to(weight.device), blocks[problem]
                )
                found[0], position = ties.cpu().unbind(1)
                alone = found[0] == 1
                found[1, alone] = part.indices(position[alone]) - low
            return found

        blocks = [self._blocks_with(t, thresholds[t]) for t in cut]
        solve(problems, count, partial(self._team.sum, what="settle ties"))
        for t, problem in zip(cut, problems, strict=True):
            tie_ends[t] = int(self._parts[t].positions(torch.tensor([problem.low + 1])))
        return thresholds, tie_ends

    def _blocks_with(self, t: int, key: int) -> Tensor | None:
        """(Step 4) Blocks of this tensor's positions that hold all entries of a key; None: any may."""
        listed = self._listed and self._low < key < self._high
        if not listed or not self._own.weights[t].is_contiguous():  # else it is not surveyed row by row
            return None
        scores, score = self._listed[t], _score(key, self._own.wide)
        # blocks of the list that hold it: nonzero takes 4 ns an entry on a CPU, the survey a tenth of that
        survey = torch.ops.drive.shard_survey(*self._list([t]), key - 1, key + 1, 0)
        filled = survey[3][:, 1].nonzero().flatten().tolist()
        pieces = [(scores[b * BLOCK :][:BLOCK] == score).nonzero().flatten() + b * BLOCK for b in filled]

        sizes = [(w.numel() + BLOCK - 1) // BLOCK for w in self._own.weights]
        begins, lengths = self._blocks[sum(sizes[:t]) : sum(sizes[: t + 1])].unbind(1)
        ties = torch.cat([begins[:0], *pieces]) + sum(part.numel() for part in self._listed[:t])
        filled = lengths.nonzero().flatten()
        begins, order = begins[filled].sort()
        blocks: Tensor = filled[order[torch.searchsorted(begins, ties, right=True) - 1]].unique()
        return blocks

    def kept(self, chosen: list[_Choice]) -> Tensor:
        """[T] survivors, on all ranks."""
        kept = {t: k for choice in chosen for t, k in zip(choice.tensors, choice.kept(), strict=True)}
        return torch.tensor([kept[t] for t in range(len(self._parts))])

    def scores(self, chosen: list[_Choice]) -> Tensor:
        """[2] normalised score of the weakest survivor (inf if none survives), sum of |S| (Eq. 7)."""
        weakest = min((choice.threshold for choice in chosen if sum(choice.kept())), default=self._top)
        if weakest == self._top:
            return torch.tensor([torch.inf, self._sum], dtype=torch.float64)
        score = _score(weakest, self._own.wide)
        score = score * score if self._squared else score
        return torch.tensor([score / self._sum if self._sum else score, self._sum], dtype=torch.float64)

    def _bracket(self, entries: int, k: int) -> tuple[int, int]:
        """(Step 1) Keys between which the k-th largest of all very likely lies. `entries`: of this rank."""
        total = sum(part.numel for part in self._parts)
        if total <= _MIN_SAMPLE:
            return 0, self._top
        count = _MIN_SAMPLE if total // _ENTRIES_PER_SAMPLE < _MIN_SAMPLE else _MAX_SAMPLE
        sample = torch.ops.drive.shard_sample(*self._own, round(count * entries / total))
        sampled = Operands([sample], [], [], [], self._own.wide)
        share = k / total
        margin = _SIGMAS * math.sqrt(count * share * (1 - share)) + 1
        ranks = math.floor(share * count - margin) + 1, math.floor(share * count + margin) + 1
        above, below = (Problem(max(1, rank), 0, self._top) for rank in ranks)
        # the sample is random anyway: two thirds of the bits of its keys will do
        solve([above, below], self._histogram(lambda _: sampled), self._total, rounds=2)
        high = self._top if ranks[0] < 1 else above.high
        low = 0 if ranks[1] > count else below.low
        return min(low, high - 1), high

    def _select(self, tensors: list[int], k: int) -> _Choice:
        """(Step 3) The k largest keys of some tensors, with the first ones of equal ones."""
        above, at_high, inside, at_low, alive, _ = self._counts[tensors].sum(0).tolist()
        k = min(k, alive)
        if k == 0:
            return _Choice(tensors, self._top, 0, [0] * len(tensors), [0] * len(tensors))
        held = self._complete and above < k <= above + at_high + inside + at_low
        if not held:
            problem = Problem(k, 1, self._top - 1)
            self._solve([problem], lambda _: _some(self._own, tensors))
        elif k <= above + at_high:
            problem = Problem(k - above, self._high, self._high)
        elif k > above + at_high + inside:
            problem = Problem(k - above - at_high - inside, self._low, self._low)
        else:
            problem = Problem(k - above - at_high, self._low + 1, self._high - 1)
            if len(tensors) == len(self._parts):  # the first round came with the survey
                narrow(problem, self._shift, self._first.long())
            self._solve([problem], lambda _: self._list(tensors))
        splits = self._splits(tensors, [problem.low] * len(tensors), held)
        return _Choice(tensors, problem.low, problem.k, *splits)

    def _select_each(self, tensors: list[int], ks: list[int]) -> list[_Choice]:
        """(Step 3) The k largest keys of each of these tensors."""
        problems = [Problem(k, 1, self._top - 1) for k in ks]
        self._solve(problems, lambda problem: _some(self._own, [tensors[problem]]))
        above, equal = self._splits(tensors, [problem.low for problem in problems], listed=False)
        return [
            _Choice([t], problem.low, k - a, [a], [e])
            for t, problem, k, a, e in zip(tensors, problems, ks, above, equal, strict=True)
        ]

    def _splits(self, tensors: list[int], thresholds: list[int], listed: bool) -> tuple[list[int], list[int]]:
        """By tensor, on all ranks: keys above its threshold, and on it."""
        if listed and thresholds[0] == self._high:
            found = self._counts[tensors][:, [_ABOVE, _AT_HIGH]]
            return found[:, 0].tolist(), found[:, 1].tolist()
        if listed and thresholds[0] == self._low:
            found = self._counts[tensors]
            return found[:, [_ABOVE, _AT_HIGH, _INSIDE]].sum(1).tolist(), found[:, _AT_LOW].tolist()
        if listed:
            counted = _survey(self._list(tensors), thresholds[0])
        elif len(set(thresholds)) == 1:
            counted = _survey(_some(self._own, tensors), thresholds[0])
        else:
            pairs = zip(tensors, thresholds, strict=True)
            counted = torch.cat([_survey(_some(self._own, [t]), threshold) for t, threshold in pairs])
        found = self._team.sum(counted, "count survivors")
        above = found[:, :3].sum(1)
        if listed:
            above += self._counts[tensors][:, [_ABOVE, _AT_HIGH]].sum(1)
        return above.tolist(), found[:, 3].tolist()

    def _list(self, tensors: list[int]) -> Operands:
        """The listed scores of some tensors, as tensors that are ranked by themselves."""
        return Operands([self._listed[t] for t in tensors], [], [], [], self._own.wide)

    def _solve(self, problems: list[Problem], operands: Callable[[int], Operands]) -> None:
        solve(problems, self._histogram(operands), self._total)

    def _histogram(self, operands: Callable[[int], Operands]) -> Callable[[int, int, int, int], Tensor]:
        def count(problem: int, low: int, shift: int, buckets: int) -> Tensor:
            counts: Tensor = torch.ops.drive.shard_histogram(*operands(problem), low, shift, buckets)
            return counts[None]

        return count

    def _total(self, counts: Tensor) -> Tensor:
        return self._team.sum(counts, "count keys")


def _owned(operands: Operands, parts: list[Part]) -> Operands:
    """Nothing in the place of parts that another rank counts."""

    def owned(tensors: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(tensors, parts, strict=True) if tensors else ()
        return [tensor if part.owner else tensor.new_empty(0) for tensor, part in pairs]

    return operands.each(owned)


def _score(key: int, wide: bool) -> float:
    bits = torch.tensor(key - 1, dtype=torch.int64 if wide else torch.int32)
    return float(bits.view(torch.float64 if wide else torch.float32))


def _some(operands: Operands, tensors: list[int]) -> Operands:
    return operands.each(lambda some: [some[t] for t in tensors] if some else [])


def _survey(operands: Operands, threshold: int) -> Tensor:
    """[T, 4] by tensor: keys above the threshold, in three columns, and on it."""
    counts: Tensor = torch.ops.drive.shard_survey(*operands, threshold, threshold + 1, 0)[0]
    return counts[:, :4].cpu()
