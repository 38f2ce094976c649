"""What the pages of results have in common: where their figures are from, and tables."""

from __future__ import annotations

import os
import subprocess
import time

import torch

from benchmarks import ROOT
from drive.experiments.bench import step as bench


def facts(device: str) -> dict[str, str]:
    """What was measured, with what: the device first."""
    found = {"device": bench.processor()}
    if device == "cuda":
        driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        found = {"device": torch.cuda.get_device_name(), "driver": driver, "CUDA": str(torch.version.cuda)}
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = os.environ.get("COMMIT") or output(*git)  # a copy of the sources may lack its history
    return {**found, "torch": torch.__version__, "commit": commit, "date": time.strftime("%Y-%m-%d")}


def output(*command: str) -> str:
    """What a command prints; "unknown" if it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))
