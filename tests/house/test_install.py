"""What `make` does to install packages: within constraints.txt where it can, else in words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
SAYS = "make: pip found no versions within constraints.txt"


@pytest.fixture
def index(tmp_path: Path) -> dict[str, str]:
    """Three versions of a package on disk, for pip to know of nothing else."""
    for version in ("1.0", "2.0", "3.0"):
        info = f"toy-{version}.dist-info"
        with ZipFile(tmp_path / f"toy-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: toy\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}


def install(
    folder: Path, constraints: str, pip: dict[str, str], what: str = "toy"
) -> tuple[subprocess.CompletedProcess, set]:
    """make's exit code and words, and which versions of the package are there then."""
    (folder / "constraints.txt").write_text(constraints)
    (folder / "Makefile").write_text(f"include {ROOT}/Makefile\ntoy: ; $(call install,{what})\n")
    program = folder / "venv" / "bin" / "pip"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m pip "$@" --target {folder}/site\n')
    program.chmod(0o755)
    # make's own: it was `make test`, perhaps
    settings = {name: text for name, text in os.environ.items() if not name.startswith(("PIP_", "MAKE"))}
    settings |= {"PIP_CONFIG_FILE": os.devnull, **pip}
    command = ["make", f"VENV={folder}/venv", "toy"]
    run = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, check=False)
    return run, {path.name for path in folder.glob("site/toy-*")}


def test_takes_the_newest_that_was_tested(tmp_path: Path, index: dict[str, str]):
    run, there = install(tmp_path, "toy<=2.5\nanother<=1\n", index)
    assert (run.returncode, there) == (0, {"toy-2.0.dist-info"}), run.stderr
    assert SAYS not in run.stderr


def test_says_so_where_there_is_none(tmp_path: Path, index: dict[str, str]):
    run, there = install(tmp_path, "toy<=0.5\n", index)
    assert (run.returncode, there) == (0, {"toy-3.0.dist-info"}), run.stderr
    assert "ResolutionImpossible" in run.stderr
    assert SAYS in run.stderr


def test_says_what_setup_py_says(tmp_path: Path):
    """Once, however often pip runs it."""
    source = tmp_path / "source"
    source.mkdir()
    says = "setup.py: no GPU is visible"
    (source / "setup.py").write_text(
        f"from setuptools import setup\nprint({says!r})\nsetup(name='toy', version='1.0')"
    )
    run, there = install(tmp_path, "", {"PIP_NO_INDEX": "1"}, f"--no-build-isolation {source}")
    assert (run.returncode, there) == (0, {"toy-1.0.dist-info"}), run.stderr
    assert run.stdout.splitlines()[1:] == [says]


def test_no_network_is_no_matter_of_versions(tmp_path: Path):
    nobody = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1"}
    run, there = install(tmp_path, "toy<=2.5\n", nobody)
    assert run.returncode and not there
    assert "connection broken" in run.stderr
    assert SAYS not in run.stderr
