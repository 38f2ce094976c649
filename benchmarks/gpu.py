"""`make gpu`: builds for the GPU that is here, with the torch that is here, checks and measures.

Every stage is a process of its own with a time limit, so that none can take the others down. The results
folder gets what they write, their output in stages.log, and in stages.md how they went. Without a GPU each
stage says so, and nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
LIBRARY = BUILD / "lib"  # what is imported: drive, drive_kernels and its compiled part
MEASURING = 180  # seconds that checks leave to the benchmarks, however long they take

REFUSAL = "Device not supported"  # what compute-sanitizer says where it cannot work: no failure of ours

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


@dataclass(frozen=True)
class Outcome:
    stage: str
    result: str  # "ok", "failed", "timed out", or why it did not run
    seconds: float = 0
    output: tuple[str, ...] = ()  # its last lines

    @property
    def bad(self) -> bool:
        return self.result in ("failed", "timed out")

    @property
    def last(self) -> str:
        return self.output[-1] if self.output else ""


def stages(out: Path) -> list[Stage]:
    """In order: what the others need, then what they would be wrong without, then the figures."""
    python, scripts, loop = sys.executable, ROOT / "benchmarks", ROOT / "benchmarks" / "bench_prune_loop.py"
    build = [python, "setup.py", "build", "--build-lib", str(LIBRARY), "--build-temp", str(BUILD / "temp")]
    tests = [
        str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()
    ]
    pytest = [python, "-m", "pytest", "-o", "addopts=-v", "-rs", "-m", "gpu", *tests]
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    no_sanitizer = "" if Path(sanitizer).exists() else "no compute-sanitizer"

    def sanitize(tool: str) -> list[str]:
        # without the caching allocator every tensor is an allocation of its own, with ends to be watched
        watch = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", sanitizer, f"--tool={tool}", "--error-exitcode=9"]
        return [*watch, python, str(scripts / "sanitize_cases.py")]

    def benchmark(script: str, seconds: float) -> list[str]:
        # begins no case in its last seconds
        minutes = f"{max(0, seconds - 15) / 60:.2f}"
        return [python, str(scripts / script), "--out", str(out), "--minutes", minutes]

    return [
        Stage("build", 200, lambda _: build),
        Stage("info", 60, lambda _: [python, "-m", "drive", "info"]),
        Stage("parity", 90, lambda _: [*pytest, "-k", "parity and not triton"]),
        Stage("tests", 120, lambda _: [*pytest, "-k", "not parity and not triton"]),
        Stage("triton", 120, lambda _: [*pytest, "-k", "triton"]),  # apart: its compiler takes its time
        Stage("memcheck", 75, lambda _: sanitize("memcheck"), no_sanitizer),
        Stage("racecheck", 75, lambda _: sanitize("racecheck"), no_sanitizer),
        Stage("benchmark", 600, partial(benchmark, "bench_prune_gpu.py")),
        Stage("sparse", 60, partial(benchmark, "bench_sparse_gpu.py")),
        Stage(
            "loop", 90, lambda _: [python, str(loop), "--out", str(out)], "" if loop.exists() else "no script"
        ),
    ]


def device() -> dict[str, str]:
    """Name and arch of the GPU, if there is one; torch's version."""
    run = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(
            f"gpu.py: needs a Python that has torch, got {sys.executable} (choose with make gpu PYTHON=...)\n"
            f"{run.stderr.strip().splitlines()[-1]}"
        )
    found: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    return found


def environment(arch: str) -> dict[str, str]:
    paths = [str(LIBRARY), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "DRIVE_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": arch,
    }


def run(stage: Stage, seconds: float, log: Path, env: dict[str, str]) -> Outcome:
    """One stage, its output appended to the log."""
    begin = time.monotonic()
    with log.open("ab") as file:
        command = stage.command(seconds)
        file.write(f"\n===== {stage.name}: {' '.join(command)}\n".encode())
        file.flush()
        start = file.tell()
        # where it runs, python -m finds what was built before what is in the sources
        where = ROOT if stage.name == "build" else LIBRARY
        process = subprocess.Popen(
            command, cwd=where, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.poll() is None and time.monotonic() - begin < seconds:
                time.sleep(0.2)
                status(f"{stage.name}: {time.monotonic() - begin:.0f} of {seconds:.0f} s")
        finally:
            timed_out = process.poll() is None
            if timed_out:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    with log.open("rb") as file:
        file.seek(start)
        output = file.read().decode(errors="replace")
    lines = tuple(line.rstrip() for line in output.splitlines() if line.strip())
    result = "timed out" if timed_out else "failed" if process.returncode else "ok"
    if result == "failed" and REFUSAL in output:
        result = f"not here: {REFUSAL}"
    return Outcome(stage.name, result, time.monotonic() - begin, lines[-30:])


def status(text: str) -> None:
    """Shows on a terminal, in one line that the next one replaces."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)


def report(outcomes: list[Outcome]) -> str:
    """stages.md: a table, and the last lines of what went wrong."""
    lines = ["| stage | result | seconds | last line of its output |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {o.stage} | {o.result} | {o.seconds:.0f} | {o.last[:150].replace('|', ' ')} |" for o in outcomes
    ]
    for outcome in outcomes:
        if outcome.bad:
            lines += ["", f"{outcome.stage}, the end of its output:", "", "```", *outcome.output, "```"]
    return "\n".join(lines) + "\n"


def benchmark_tables(path: Path) -> str:
    """The tables of prune.md without what explains them."""
    lines = path.read_text().splitlines() if path.exists() else []
    return "\n".join(line for line in lines if line.startswith(("| ", "- ")) or not line)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: docs/results/<GPU>")
    parser.add_argument("--minutes", type=float, default=9, help="for all stages")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    found = device()
    if "name" not in found:
        for stage in stages(Path()):
            print(f"{stage.name:10} no CUDA device")
        return 0

    slug = re.sub(r"[^a-z0-9]+", "-", found["name"].lower()).strip("-")
    out = (options.out or ROOT / "docs" / "results" / slug).resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in ("stages.log", "stages.md", "prune.csv", "prune.md", "prune.png", "sparse.md"):
        (out / old).unlink(missing_ok=True)
    shutil.rmtree(LIBRARY, ignore_errors=True)  # a failed build must not leave the last one's kernels
    LIBRARY.mkdir(parents=True)
    print(f"{found['name']}, torch {found['torch']}; results in {out}", flush=True)

    outcomes: list[Outcome] = []
    plan = stages(out)
    for stage in plan:
        measuring = stage.name in ("benchmark", "sparse", "loop")
        later = (
            sum(s.seconds for s in plan[plan.index(stage) + 1 :] if not s.missing) if measuring else MEASURING
        )
        seconds = min(stage.seconds, deadline - time.monotonic() - later)
        if stage.missing or seconds < 5:
            outcome = Outcome(stage.name, stage.missing or "no time was left")
        else:
            outcome = run(stage, seconds, out / "stages.log", environment(found["arch"]))
        outcomes.append(outcome)
        status("")
        print(
            f"{outcome.stage:10} {outcome.result}, {outcome.seconds:.0f} s: {outcome.last[:120]}", flush=True
        )
        (out / "stages.md").write_text(report(outcomes))
    print(report(outcomes), benchmark_tables(out / "prune.md"), sep="\n")
    return int(any(outcome.bad for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
