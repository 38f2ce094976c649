"""The examples, as people run them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from drive import Masks

EXAMPLES = Path(__file__).parents[2] / "examples"
PATIENCE = 120  # seconds for a run; it takes some 10

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="finds processes in Linux's /proc"
)

OPTIONS = (
    *("--warm-up", "4", "--every", "2", "--print-every", "1", "--iterations", "3", "--lr", "0.01"),
    *("--width", "32", "--layers", "2", "--heads", "2", "--length", "32", "--batch", "12"),
)


def children(parent: int) -> dict[int, dict[str, str]]:
    """Processes that a process has started, and their environments."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                entries = (folder / "environ").read_text().split("\0")
                found[int(folder.name)] = dict(entry.partition("=")[::2] for entry in entries)
        except (OSError, ValueError):  # it has ended meanwhile
            continue
    return found


@contextmanager
def torchrun(ranks: int, example: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """torchrun on this machine; neither it nor a rank is left afterwards."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    process = subprocess.Popen(
        [sys.executable, *command, str(EXAMPLES / example), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        yield process
    finally:
        for pid in children(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()
        process.stdout.close()


def wait_for(pattern: str, folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.05)


def test_fsdp2_transformer(tmp_path: Path):
    """Killed after it has pruned, it goes on from its last checkpoint on another number of ranks."""
    transformers = pytest.importorskip("transformers")
    run = "fsdp2_transformer.py", "--out", str(tmp_path), *OPTIONS
    with torchrun(2, *run, "--steps", "1000000") as process:
        wait_for("step-00000[6-9]", tmp_path, process)
        ranks = {environment["RANK"]: pid for pid, environment in children(process.pid).items()}
        os.kill(ranks["1"], signal.SIGKILL)
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode != 0
        assert "2 ranks on cpu, from step 0\n" in output and "pruned 80.00% of" in output
        assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())

    last = max(int(folder.name.removeprefix("step-")) for folder in tmp_path.glob("step-*"))
    with torchrun(3, *run, "--steps", str(last + 3)) as process:
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
    assert f"3 ranks on cpu, from step {last}\n" in output
    assert "pruned" not in output, "the masks are those of the first run"
    assert [folder.name for folder in tmp_path.glob("step-*")] == [f"step-{last + 3:06}"]

    found = torch.load(tmp_path / "model.pt")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**found["config"]))
    model.load_state_dict(found["model"])
    masks = Masks.load(tmp_path / "masks.safetensors")
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    assert pruned == round(0.8 * sum(mask.numel() for mask in masks.values()))
    for name, mask in masks.items():
        weight = model.get_parameter(name).detach()
        assert not weight[~mask].any() and weight[mask].all()
    assert found["loss"] < 4.5, "5.5 nats is a guess among 256 bytes"
