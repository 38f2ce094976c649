"""One exact global step over tensors that are spread over ranks: drive::prune_to_cost_ with counts added up.

Only counts travel, of sizes that do not depend on the number of entries; no rank sees another one's scores.
What entries cost is a count of them times the cost of one in their tensor. drive::prune_ is the step in which
every entry costs 1.

  1. Sample: the ranks look at some 2^14 of their entries, of each tensor by what it costs. Two rounds of
     histograms of these keys bracket the threshold, low <= T <= high, as in csrc/prune/cpu/step.h.
  2. Survey (one pass over theta, G and an old mask): by tensor, how many keys lie above, at and inside the
     bracket; those inside, 1 to 4 % of all, are listed, where the tensors are. Copies of one part on several
     ranks are counted once, and compared by a checksum. A non-finite score ends the step here, on all ranks.
  3. Threshold T, the largest key down to which the entries cost the budget or more: by radix selection among
     the listed keys, whose first histogram came with the survey. The counts prove that the bracket held; if
     it did not, among all keys, one pass a round.
  4. Ties: the first entries on the threshold survive, in the order of tensors and then row-major indices of
     the whole tensor, up to one that costs too much. In the one tensor where they end, their end is found by
     the same selection: among indices instead of keys, whoever holds them. If the last survivor is the last
     tie of its bucket, as it is when it is alone there, all of the bucket survive, and one round will do.
  5. Apply (one more pass), alone.

The host waits for a device only to read what an all-reduce has brought (Team).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from drive_kernels.prune.shards import COUNTS, Operands, top_key

from .choice import Choice
from .copies import Copies
from .placement import Part
from .radix import Count, Problem, bucketing, narrow, solve
from .shards import Shards
from .team import sent

# As in csrc/prune/sampling.h and csrc/prune/cpu/sample.h, with the reasons
_SIGMAS = 5
_MIN_SAMPLE, _MAX_SAMPLE, _ENTRIES_PER_SAMPLE = 1 << 14, 1 << 16, 1 << 12
_ENTRIES_PER_LISTED = 16

# Whole numbers travel as float64 in digits of so many bits: those of 2^13 ranks add up exactly.
_DIGIT = 40

_ABOVE, _AT_HIGH, _INSIDE, _AT_LOW, _ALIVE, _NONFINITE = range(len(COUNTS))


def sharded_step(
    shards: Shards,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    mask_grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    fresh: bool,
    costs: Sequence[int],
    scales: Sequence[float],
    max_cost: int,
    min_keep: int,
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """drive::prune_to_cost_ for the parts of one rank: its arguments, and its outputs, those of all ranks.

    Args:
        scales: empty: 1.

    Returns:
        kept, nonfinite, scores: as drive::prune_to_cost_'s, but on the CPU, where they are known.
        bad_ranks: [T] the first rank with a non-finite score; the team's size where there is none.

    Raises:
        ValueError: copies of a part differ.
        RuntimeError: another rank did not come.
    """
    wide = bool(mask_grads) or any(w.dtype == torch.float64 for w in weights)
    operands = Operands(weights, grads, mask_grads, masks, fresh, wide, scales)
    plan = _Plan(shards, operands, costs, max_cost)
    bad_ranks = [shards.team.size] * len(weights)
    if not plan.nonfinite.any():
        chosen = plan.choose(max_cost, min_keep)
        plan.apply(operands, chosen)
        kept, scores = plan.kept(chosen), plan.scores(chosen)
    else:
        bad_ranks = plan.bad_ranks()
        if fresh:
            for mask in masks:
                mask.fill_(True)
        kept, scores = plan.alive, torch.full((2,), torch.nan, dtype=torch.float64)
    return kept, plan.nonfinite, scores, bad_ranks


class _Plan:
    """Steps 1 to 4 decide everything; step 5 writes it."""

    def __init__(self, shards: Shards, operands: Operands, costs: Sequence[int], max_cost: int):
        self._team, self._parts = shards.team, list(shards.parts.values())
        self._own = _owned(operands, self._parts)
        self._top = top_key(operands.wide)
        self._squared = bool(operands.grads) and not operands.mask_grads
        self._costs = costs

        total = sum(part.numel * cost for part, cost in zip(self._parts, costs, strict=True))
        self._low, self._high = self._bracket(total, max_cost)
        entries = sum(w.numel() for w in self._own.weights)
        room = max(entries // _ENTRIES_PER_LISTED, _MIN_SAMPLE)
        counts, score_sum, self._listed = torch.ops.drive.shard_survey(
            *self._own, self._low, self._high, room
        )
        self._bad_here = counts[_NONFINITE] > 0
        overflow = counts[_INSIDE].sum(0, keepdim=True) > room
        copies = Copies(operands, shards)
        self._shift, buckets = bucketing(self._low + 1, self._high - 1)
        histogram = self._histogram(self._all, True, self._low + 1, self._shift, buckets)

        # in one piece, as float64: whole numbers below 2^53 add up exactly in any order
        table = torch.cat([counts, copies.evidence])
        shifts = range(0, total.bit_length(), _DIGIT)
        digits = [histogram >> shift & ((1 << _DIGIT) - 1) for shift in shifts]
        mine = [table.flatten(), overflow, score_sum[None], *digits]
        found = self._team.sum(torch.cat([part.double() for part in mine]), "count scores")
        found_table, overflows, score_sum, *digits = found.split([len(part) for part in mine])
        self._first = torch.zeros(buckets, dtype=torch.int64)
        for digit, shift in zip(digits, shifts, strict=True):
            self._first += digit.long() << shift
        self._complete, self._sum = not overflows, float(score_sum)
        counted = found_table.long().view_as(table)
        self._counts: Tensor = counted[: len(COUNTS)]
        evidence = counted[len(COUNTS) :]
        copies.check(evidence)

    @property
    def nonfinite(self) -> Tensor:
        """[T] int64: NaN or infinite scores, on all ranks."""
        return self._counts[_NONFINITE]

    def bad_ranks(self) -> list[int]:
        """By tensor: the first rank with a NaN or infinite score; the team's size where there is none."""
        last = self._team.size
        found = torch.where(self._bad_here, last - self._team.rank, 0)
        return (last - self._team.largest(found, "find non-finite scores")).tolist()

    @property
    def alive(self) -> Tensor:
        """[T] entries that are not pruned yet, on all ranks."""
        return self._counts[_ALIVE]

    def choose(self, budget: int, min_keep: int) -> list[Choice]:
        """(Step 3) What survives, for `budget` in all: of each tensor `min_keep` entries or all it has."""
        free = self._all
        chosen: list[Choice] = []
        guards = self.alive.clamp(max=min_keep).tolist()
        while True:
            choice = self._select(free, budget)
            # A tensor below its guard keeps exactly its min_keep best: what it gains, the others lose, so
            # the threshold for them only rises, and no such tensor can rise above its guard again.
            short = [t for t, kept in zip(free, choice.kept(), strict=True) if kept < guards[t]]
            if not short:
                return [*chosen, choice]
            chosen += self._select_each(short, [guards[t] for t in short])
            budget -= sum(guards[t] * self._costs[t] for t in short)
            free = [t for t in free if t not in set(short)]

    def apply(self, operands: Operands, chosen: list[Choice]) -> None:
        """(Step 5) Writes weights and masks of all parts, those included that another rank counts."""
        thresholds, tie_ends = self._cuts(chosen)
        # one call, which writes all or nothing; what is listed is of the parts that this rank counts
        complete = all(part.owner for part in self._parts)
        listed = complete and len(chosen) == 1 and self._is_listed(chosen[0].threshold)
        torch.ops.drive.shard_apply_(*operands, self._listed if listed else None, thresholds, tie_ends)

    def _cuts(self, chosen: list[Choice]) -> tuple[list[int], list[int]]:
        """(Step 4) By tensor: the threshold, and the position here at which the ties on it end to survive."""
        thresholds, tie_ends = [self._top] * len(self._parts), [0] * len(self._parts)
        problems: list[Problem] = []
        cut: list[int] = []
        for choice in chosen:
            ended = False  # here, and in all that follow, none survives
            for t, ties, equal in zip(choice.tensors, choice.surviving_ties(), choice.equal, strict=True):
                thresholds[t] = choice.threshold
                if ended:
                    continue
                ended = ties < equal
                if not ended:
                    tie_ends[t] = math.prod(self._parts[t].sizes)
                elif ties > 0:
                    cut.append(t)
                    last = math.prod(self._parts[t].shape) - 1
                    problems.append(Problem(equal - ties + 1, 0, last, up_to_next=True))

        def count(problem: int, low: int, shift: int, buckets: int) -> Tensor:
            t = cut[problem]
            part, weight = self._parts[t], self._own.weights[t]
            if not weight.numel():
                return torch.zeros(buckets, dtype=torch.int64, device=weight.device)
            bounds = low + (torch.arange(buckets + 1) << shift)
            ends = sent(part.positions(bounds.clamp(max=math.prod(part.shape))), weight.device)
            threshold = thresholds[t]
            ties: Tensor = torch.ops.drive.shard_ties(
                *self._asked([t], self._is_listed(threshold)), threshold, ends
            )
            return ties

        solve(problems, count, partial(self._team.sum, what="settle ties"))
        for t, problem in zip(cut, problems, strict=True):
            tie_ends[t] = int(self._parts[t].positions(torch.tensor([problem.low + 1])))
        return thresholds, tie_ends

    def kept(self, chosen: list[Choice]) -> Tensor:
        """[T] survivors, on all ranks."""
        kept = {t: k for choice in chosen for t, k in zip(choice.tensors, choice.kept(), strict=True)}
        return torch.tensor([kept[t] for t in range(len(self._parts))])

    def scores(self, chosen: list[Choice]) -> Tensor:
        """[2] normalised score of the weakest survivor (inf if none survives), sum of |S| (Eq. 7)."""
        weakest = min(choice.weakest for choice in chosen)
        if weakest == self._top:
            return torch.tensor([torch.inf, self._sum], dtype=torch.float64)
        score = _score(weakest, self._own.wide)
        score = score * score if self._squared else score
        return torch.tensor([score / self._sum if self._sum else score, self._sum], dtype=torch.float64)

    def _bracket(self, total: int, max_cost: int) -> tuple[int, int]:
        """(Step 1) Keys between which the threshold very likely lies. `total`: what all entries cost."""
        entries = sum(part.numel for part in self._parts)
        if entries <= _MIN_SAMPLE:
            return 0, self._top
        count = _MIN_SAMPLE if entries // _ENTRIES_PER_SAMPLE < _MIN_SAMPLE else _MAX_SAMPLE
        sampled = *Operands([self._sample(count, total)], [], [], [], True, self._own.wide, []), None, [0]

        def histogram(_: int, low: int, shift: int, buckets: int) -> Tensor:
            counts: Tensor = torch.ops.drive.shard_histogram(*sampled, low, shift, buckets)
            return counts

        share = min(max_cost, total) / total
        margin = _SIGMAS * math.sqrt(count * share * (1 - share)) + 1
        ranks = math.floor(share * count - margin) + 1, math.floor(share * count + margin) + 1
        above, below = (Problem(max(1, rank), 1, self._top) for rank in ranks)
        # the sample is random anyway: two thirds of the bits of its keys will do
        self._solve([above, below], histogram, rounds=2)
        high = self._top if ranks[0] < 1 else above.high
        low = 0 if ranks[1] > count else below.low
        return min(low, high - 1), high

    def _sample(self, count: int, total: int) -> Tensor:
        """Scores of this rank's entries, of `count` on all ranks: of each cost its share in the total."""
        found = []
        for cost, tensors in self._by_cost(self._all):
            some = _some(self._own, tensors)
            entries = sum(w.numel() for w in some.weights)
            share = round(count * entries * cost / total)
            scores = torch.ops.drive.shard_sample(*some, min(share, entries))
            if share > entries:  # few and costly: each several times
                scores = scores[torch.arange(share, device=scores.device) * entries // share]
            found.append(scores)
        return torch.cat(found)

    def _select(self, tensors: list[int], k: int) -> Choice:
        """(Step 3) Of some tensors the largest keys that cost k, with the first ones of equal ones."""
        costs = [self._costs[t] for t in tensors]
        spent = self._counts[:, tensors] * torch.tensor(costs, dtype=torch.int64)
        above, at_high, inside, at_low, alive, _ = spent.sum(1).tolist()
        k = min(k, alive)
        if k == 0:
            return Choice(tensors, costs, self._top, 0, [0] * len(tensors), [0] * len(tensors))
        held = self._complete and above < k <= above + at_high + inside + at_low
        if not held:
            problem = Problem(k, 1, self._top - 1)
        elif k <= above + at_high:
            problem = Problem(k - above, self._high, self._high)
        elif k > above + at_high + inside:
            problem = Problem(k - above - at_high - inside, self._low, self._low)
        else:
            problem = Problem(k - above - at_high, self._low + 1, self._high - 1)
            if len(tensors) == len(self._parts):  # the first round came with the survey
                narrow(problem, self._shift, self._first)
        count = self._count(tensors, held)
        self._solve([problem], count)
        splits = self._splits(tensors, [problem.low] * len(tensors), held)
        choice = Choice(tensors, costs, problem.low, problem.k, *splits)
        if not any(choice.surviving_ties()):  # costly entries seldom use up the budget
            choice.larger = self._larger(choice, problem, count)
        return choice

    def _select_each(self, tensors: list[int], ks: list[int]) -> list[Choice]:
        """(Step 3) The k largest keys of each of these tensors."""
        costs = [self._costs[t] for t in tensors]
        problems = [Problem(k * cost, 1, self._top - 1) for k, cost in zip(ks, costs, strict=True)]
        self._solve(problems, lambda problem, *cut: self._histogram([tensors[problem]], False, *cut))
        above, equal = self._splits(tensors, [problem.low for problem in problems], held=False)
        return [
            Choice([t], [cost], problem.low, problem.k, [a], [e])
            for t, cost, problem, a, e in zip(tensors, costs, problems, above, equal, strict=True)
        ]

    def _larger(self, choice: Choice, problem: Problem, count: Count) -> int:
        """The next key above the threshold of a choice, the top one if there is none.

        Args:
            problem: of the threshold, solved. Nearly always the search has come by the next key, and one more
                round finds it, or none.
            count: of the keys that were searched.
        """
        if not any(choice.above):
            return self._top
        larger = problem.larger
        if larger is None:
            cost = sum(c * n for c, n in zip(choice.costs, choice.above, strict=True))
            larger = Problem(cost, choice.threshold + 1, self._top - 1)
            count = self._count(choice.tensors, listed=False)
        self._solve([larger], count)
        return larger.low

    def _splits(self, tensors: list[int], thresholds: list[int], held: bool) -> tuple[list[int], list[int]]:
        """By tensor, on all ranks: keys above its threshold, and on it.

        Args:
            held: all have one threshold, in the bracket.
        """
        counts = self._counts[:, tensors]
        if held and thresholds[0] == self._high:
            return counts[_ABOVE].tolist(), counts[_AT_HIGH].tolist()
        top = counts[[_ABOVE, _AT_HIGH]].sum(0)
        if held and thresholds[0] == self._low:
            return (top + counts[_INSIDE]).tolist(), counts[_AT_LOW].tolist()
        split = torch.ops.drive.shard_split(*self._asked(tensors, held), thresholds)
        above, equal = self._team.sum(split, "count survivors").unbind(1)
        return (above + top if held else above).tolist(), equal.tolist()

    def _is_listed(self, threshold: int) -> bool:
        return self._complete and self._low < threshold < self._high

    @property
    def _all(self) -> list[int]:
        return list(range(len(self._parts)))

    def _by_cost(self, tensors: list[int]) -> list[tuple[int, list[int]]]:
        """Those whose entries cost the same, together."""
        ordered = sorted(tensors, key=self._costs.__getitem__)
        return [(cost, list(some)) for cost, some in groupby(ordered, self._costs.__getitem__)]

    def _histogram(self, tensors: list[int], listed: bool, low: int, shift: int, buckets: int) -> Tensor:
        """[buckets] what the keys in each cost, on this rank. `listed`: as in `_asked`."""
        counts = [
            cost * torch.ops.drive.shard_histogram(*self._asked(some, listed), low, shift, buckets)
            for cost, some in self._by_cost(tensors)
        ]
        return torch.stack(counts).sum(0)

    def _count(self, tensors: list[int], listed: bool) -> Count:
        """The same for one problem."""
        return lambda _, *bucketing: self._histogram(tensors, listed, *bucketing)

    def _asked(self, tensors: list[int], listed: bool) -> tuple[Any, ...]:
        """Of what to count keys: the first arguments of the ops that do.

        Args:
            listed: what the survey has listed of these tensors; else all of them.
        """
        if listed:
            return *self._own, self._listed, tensors
        return *_some(self._own, tensors), None, list(range(len(tensors)))

    def _solve(self, problems: list[Problem], count: Count, rounds: int | None = None) -> None:
        solve(problems, count, partial(self._team.sum, what="count keys"), rounds)


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
    picked = operands.each(lambda some: [some[t] for t in tensors] if some else [])
    return picked._replace(scales=[operands.scales[t] for t in tensors] if operands.scales else [])
