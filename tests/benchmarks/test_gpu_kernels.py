"""What `make gpu` has Triton compile beforehand, and that a later launch would find it."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from triton_launches import prune as launches

from benchmarks import ROOT
from benchmarks.gpu import kernels


def test_every_launch_of_a_step_is_compiled():
    with kernels.recorded() as found:
        kernels.prune_steps()
    assert {x.kernel for x in launches()} == {kernel for kernel, _ in found}
    hot = [arguments for kernel, arguments in found if kernel.fn.__name__ == "apply_keys"]
    forms = {(x["FRESH"], x["WIDE"], x["COSTED"]) for x in hot}
    assert forms == set(product((False, True), repeat=3))


COMPILE = """
from benchmarks.gpu import kernels
with kernels.recorded() as launches:
    kernels.prune_steps()
some = launches[::20]
print(len(some), kernels.compile_all(some, 90, processes=2))
"""


def test_a_later_process_finds_them_in_the_cache(tmp_path: Path):
    """By Triton's own key, of sources, arguments, options, compiler and target."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    said = [
        subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    launches, found = said[0].stdout.split()
    assert int(launches) >= 3 and found == "0"
    assert said[1].stdout.split() == [launches, launches]
