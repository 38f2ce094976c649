"""Processes that tests start."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def environment(**more: str) -> dict[str, str]:
    """Of a process that finds the modules that this one finds, in whatever folder it runs."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **more}


def run_on(capability: str, folder: Path, function: Callable[..., object], *arguments: str) -> str:
    """What a function of a module of tests returns, as text; "default", "avx2" or "avx512" is all it has.

    The compiled kernels choose their variants once a process. It runs in a folder that is not the checkout.
    """
    module = function.__module__
    run = subprocess.run(
        [sys.executable, "-c", f"import {module}; print({module}.{function.__name__}(*{arguments!r}))"],
        env=environment(ATEN_CPU_CAPABILITY=capability),
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return run.stdout.strip()
