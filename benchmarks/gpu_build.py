"""Builds the package into build/gpu, for the GPU that is here: python benchmarks/gpu_build.py [BEGINNING ...]

Sources whose names begin so are left out, and what they implement is missing: a smoke test need not wait for
the CPU's sparse layers. What a later build finds compiled already, it does not compile again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import setuptools  # noqa: F401  (brings distutils, which Python has not from 3.12 on)

from distutils.core import run_setup  # isort: skip

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
LIBRARY = BUILD / "lib"  # what is imported: drive, drive_kernels and its compiled part


def main() -> None:
    without = tuple(sys.argv[1:])
    os.chdir(ROOT)
    arguments = ["-q", "build", "--build-lib", str(LIBRARY), "--build-temp", str(BUILD / "temp")]
    package = run_setup("setup.py", arguments, stop_after="commandline")
    for extension in package.ext_modules:
        extension.sources = [s for s in extension.sources if not Path(s).name.startswith(without)]
    package.run_commands()


if __name__ == "__main__":
    main()
