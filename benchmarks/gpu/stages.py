"""What `make gpu`, `make gpu-smoke` and `make gpu-table1` share: stages with time limits, one after another.

Every stage is a process of its own with a limit, so that none can take the others down.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import ROOT
from benchmarks.gpu.build import BUILD, LIBRARY

LEAST = 5  # seconds below which a stage is not begun

# What profilers and sanitizers say where they cannot work: no failure of ours.
REFUSALS = (
    "Device not supported",
    "ERR_NVGPUCTRPERM",  # no permission to read the counters
    "LibraryNotLoaded",
)

# Prints what there is as JSON: a process of its own, since a broken driver may end it.
PROBE = """
import json, torch
found = {"torch": torch.__version__}
if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability()
    found |= {"name": torch.cuda.get_device_name(), "arch": f"{major}.{minor}"}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Stage:
    """A command and its limit in seconds."""

    name: str
    seconds: float
    command: Callable[[float], list[str]]  # of the seconds that it gets
    missing: str = ""  # why it cannot run here
    told: bool = False  # what it prints is a result: shown as it comes, and kept in the report


@dataclass(frozen=True)
class Outcome:
    stage: str
    result: str  # "ok", "failed", "timed out", or why it did not run, or not to its end
    seconds: float = 0
    output: tuple[str, ...] = ()  # its last lines
    told: bool = False

    @property
    def bad(self) -> bool:
        return self.result in ("failed", "timed out")

    @property
    def last(self) -> str:
        return next((line for line in reversed(self.output) if line), "")


def script(name: str, *arguments: object) -> list[str]:
    """A module of this package as a command."""
    return [sys.executable, "-m", f"{__package__}.{name}", *map(str, arguments)]


def tool(name: str) -> str | None:
    """One of the toolkit's, which need not be on the PATH."""
    places = (
        Path("/usr/local/cuda/bin"),
        *sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True),
    )
    return shutil.which(name) or next((str(p / name) for p in places if (p / name).exists()), None)


def device(target: str) -> dict[str, str]:
    """Name and arch of the GPU, if there is one; torch's version. `target`: what was made."""
    run = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(
            f"make {target}: needs a Python that has torch, got {sys.executable} "
            f"(choose with make {target} PYTHON=...)\n"
            f"{run.stderr.strip().splitlines()[-1]}"
        )
    found: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    return found


def without_device(plan: list[Stage]) -> int:
    """Each stage says that there is no GPU; nothing is written, and it is no failure."""
    for stage in plan:
        print(f"{stage.name:10} no CUDA device")
    return 0


def results(found: dict[str, str]) -> Path:
    """The folder for what is measured on this GPU."""
    return ROOT / "docs" / "results" / re.sub(r"[^a-z0-9]+", "-", found["name"].lower()).strip("-")


def environment(arch: str) -> dict[str, str]:
    paths = [str(LIBRARY), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "TORCH_CUDA_ARCH_LIST": arch,
        "TRITON_CACHE_DIR": str(BUILD / "triton"),
    }


def clear() -> None:
    """A failed build must not leave the last one's kernels. What the compilers made of each source stays."""
    shutil.rmtree(LIBRARY, ignore_errors=True)
    LIBRARY.mkdir(parents=True)


def go_through(
    plan: list[Stage],
    seconds: float,
    perform: Callable[[Stage, float], Outcome],
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Outcome]:
    """All stages within so many seconds: each gets its limit, or what is left. So the order is all."""
    deadline = clock() + seconds
    for stage in plan:
        given = min(stage.seconds, deadline - clock())
        if stage.missing or given < LEAST:
            yield Outcome(stage.name, stage.missing or "no time was left")
            continue
        outcome = perform(stage, given)
        if outcome.result == "timed out" and given < stage.seconds:  # no fault of its own
            outcome = replace(outcome, result="cut short")
        yield outcome


def run(stage: Stage, seconds: float, log: Path, env: dict[str, str]) -> Outcome:
    """One stage, its output appended to the log."""
    begin = time.monotonic()
    with log.open("ab") as file, log.open("rb") as written:
        command = stage.command(seconds)
        file.write(f"\n===== {stage.name}: {' '.join(command)}\n".encode())
        file.flush()
        start = written.seek(0, os.SEEK_END)
        # where it runs, python -m finds what was built before what is in the sources
        where = ROOT if stage.name == "build" else LIBRARY
        process = subprocess.Popen(
            command, cwd=where, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.poll() is None and time.monotonic() - begin < seconds:
                time.sleep(0.2)
                if stage.told:
                    print(written.read().decode(errors="replace"), end="", flush=True)
                else:
                    status(f"{stage.name}: {time.monotonic() - begin:.0f} of {seconds:.0f} s")
        finally:
            timed_out = process.poll() is None
            if timed_out:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if stage.told:
            print(written.read().decode(errors="replace"), end="", flush=True)
        written.seek(start)
        output = written.read().decode(errors="replace")
    lines = [line.rstrip() for line in output.strip().splitlines()]
    result = "timed out" if timed_out else "failed" if process.returncode else "ok"
    if refusals := [words for words in REFUSALS if words in output]:
        result = f"not here: {refusals[0]}" if result == "failed" else result
    return Outcome(stage.name, result, time.monotonic() - begin, tuple(lines[-40:]), stage.told)


def status(text: str) -> None:
    """Shows on a terminal, in one line that the next one replaces."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)


def tell(outcome: Outcome) -> None:
    """How a stage went, in a line."""
    status("")
    print(f"{outcome.stage:10} {outcome.result}, {outcome.seconds:.0f} s: {outcome.last[:120]}", flush=True)


def report(outcomes: list[Outcome]) -> str:
    """A table, the last lines of what went wrong, and results that stages printed."""
    lines = ["| stage | result | seconds | last line of its output |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {o.stage} | {o.result} | {o.seconds:.0f} | {o.last[:150].replace('|', ' ')} |" for o in outcomes
    ]
    for outcome in outcomes:
        if outcome.bad:
            lines += ["", f"{outcome.stage}, the end of its output:", "", "```", *outcome.output, "```"]
        elif outcome.told and outcome.output:
            lines += ["", f"{outcome.stage}:", "", *outcome.output]
    return "\n".join(lines) + "\n"
