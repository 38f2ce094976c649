"""Builds the package into build/gpu, for the GPU that is here. What has been compiled already is not again.

Without the CPU's sparse layers, which take most of the time and are of no use to what runs on a GPU: where
one of them is called, its reference serves.
"""

from __future__ import annotations

import os

import setuptools  # noqa: F401  (brings distutils, which Python has not from 3.12 on)

from benchmarks import ROOT

from distutils.core import run_setup  # isort: skip

BUILD = ROOT / "build" / "gpu"
LIBRARY = BUILD / "lib"  # what is imported: drive, drive_kernels and its compiled part
LEFT_OUT = "csrc/sparse/"


def main() -> None:
    os.chdir(ROOT)
    os.environ["DRIVE_CUDA"] = "1"
    arguments = ["-q", "build", "--build-lib", str(LIBRARY), "--build-temp", str(BUILD / "temp")]
    package = run_setup("setup.py", arguments, stop_after="commandline")
    for extension in package.ext_modules:
        extension.sources = [s for s in extension.sources if not s.startswith(LEFT_OUT)]
    package.run_commands()


if __name__ == "__main__":
    main()
