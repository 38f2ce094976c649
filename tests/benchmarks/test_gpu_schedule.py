"""`make gpu-smoke` and `make gpu` in a dry run: what comes first, and what fits into the time."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.gpu import full, smoke
from benchmarks.gpu.stages import Outcome, Stage, go_through

# Seconds of a first step to 90 % on an H200, on paper, before the kernels had 16 KB a chunk: torch.mul by its
# bandwidth, and from 1.8 (1 B, float32) to 4 times that. docs/gpu-passes.md has less.
STEP = {"138M": 0.75e-3, "1B": 5e-3, "11M": 0.12e-3}
RIVAL = 100  # steps that one of PyTorch's ways takes: ten times what the goal asks for
START = 8  # seconds until a script has imported PyTorch: 2 to 15 on two cores, which were busy


def case(size: str, ours: int, rivals: int, rounds: int, checks: int) -> float:
    """Seconds of a case in gpu/step/measure.py: with two rounds that are not timed, and weights put back."""
    step = STEP[size]
    slow = 0.3 + 3 * RIVAL * step  # the time that it may take, and the runs that come in any case
    return ours * (rounds + 2) * 2 * step + rivals * slow + checks * RIVAL * step + 20 * step


def smoke_case(size: str) -> float:
    return case(size, ours=3, rivals=2, rounds=10, checks=1)


def full_case(size: str) -> float:
    return case(size, ours=5, rivals=4, rounds=20, checks=2)


# Where a time is known, it is doubled in the dry run. Measured on two cores, in seconds of CPU time:
SMOKE = {
    "build": 34 + START,  # nvcc on prune.cu for one architecture; the other sources take less, beside it
    "parity": 3 + START,
    "speed": START + sum(map(smoke_case, ("138M", "138M", "1B", "1B"))),
}
KNOWN = {
    "build": 8,  # after `make gpu-smoke`, measured: all is compiled, and only linked
    "kernels": START + 4 + 572 * 0.28 / 16,  # finding the launches; each is compiled by one of 16 cores
    "parity": 2 * 3 + START,
    "telling": START + sum(map(full_case, ("138M", "138M", "1B", "1B", "11M", "11M", "138M", "138M"))),
    "exactness": 66,  # both sides of the comparison on the CPU
}
# Of the others nobody knows the time: each takes its limit.


@dataclass
class DryRun:
    """A clock, and stages that take the time they are known to take."""

    took: dict[str, float]
    factor: float = 2.0
    now: float = 0.0

    def __call__(self, stage: Stage, seconds: float) -> Outcome:
        wanted = self.factor * self.took.get(stage.name, stage.seconds / self.factor)
        self.now += min(wanted, seconds)
        return Outcome(stage.name, "ok" if wanted <= seconds else "timed out", min(wanted, seconds))

    def through(self, plan: list[Stage], seconds: float) -> dict[str, str]:
        """Results by stage."""
        there = [Stage(s.name, s.seconds, s.command) for s in plan]  # tools that are missing here, too
        return {o.stage: o.result for o in go_through(there, seconds, self, lambda: self.now)}


def test_smoke_fits_into_three_minutes():
    dry = DryRun(SMOKE)
    assert dry.through(smoke.stages(), smoke.SECONDS) == dict.fromkeys(SMOKE, "ok")
    assert dry.now <= smoke.SECONDS < 180 - START


FIRST = ("build", "kernels", "parity", "telling", "exactness", "tests")


def test_six_minutes_are_enough_for_what_matters():
    """From the build to the tests at twice the times that are known; at these themselves, beyond."""
    plan, dry = full.stages(Path()), DryRun(KNOWN)
    found = dry.through(plan, 360)
    assert tuple(found)[: len(FIRST)] == FIRST
    assert all(found[name] == "ok" for name in FIRST), found
    assert dry.now <= 360
    found = DryRun(KNOWN, factor=1).through(plan, 360)
    assert all(found[name] == "ok" for name in (*FIRST, "counters", "memcheck", "racecheck")), found


def test_from_a_bare_machine():
    """Nothing is compiled yet: nine minutes, the default."""
    found = DryRun({**KNOWN, "build": SMOKE["build"]}).through(full.stages(Path()), 540)
    assert all(found[name] == "ok" for name in (*FIRST, "counters", "memcheck")), found


@pytest.mark.parametrize("minutes", (6, 9))
def test_if_everything_hangs(minutes: int):
    """Every stage runs into its limit: the telling cases still have theirs, and the time is kept."""
    plan = full.stages(Path())
    dry = DryRun({stage.name: 1e6 for stage in plan})
    found = dry.through(plan, 60 * minutes)
    assert dry.now == 60 * minutes
    before = [stage.seconds for stage in plan[: list(found).index("telling") + 1]]
    assert sum(before) <= 60 * minutes
    assert list(found.values())[-1] == "no time was left"
    begun = [result for result in found.values() if result != "no time was left"]
    assert begun == ["timed out"] * (len(begun) - 1) + ["cut short"]
    assert Outcome("", "timed out").bad and not Outcome("", "cut short").bad


@pytest.mark.parametrize("stage", (*smoke.stages(), *full.stages(Path())), ids=lambda stage: stage.name)
def test_every_stage_runs_a_module_that_there_is(stage: Stage):
    command = stage.command(stage.seconds)
    assert find_spec(command[command.index("-m") + 1])
