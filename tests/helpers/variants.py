"""The compiled kernels' variants for other instruction sets: in processes of their own, which choose one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def run_on(capability: str, folder: Path, function: Callable[..., object], *arguments: str) -> str:
    """What a function of a module of tests returns, as text; "default", "avx2" or "avx512" is all it has.

    The process runs in a folder that is not the checkout, and finds the modules that this one finds.
    """
    module = function.__module__
    run = subprocess.run(
        [sys.executable, "-c", f"import {module}; print({module}.{function.__name__}(*{arguments!r}))"],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return run.stdout.strip()
