"""Who may import or include whom, how large files and folders are."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Whose headers a room of csrc includes beside its own.
HEADERS = {
    "csrc": {"csrc/common"},
    "csrc/common": set(),
    "csrc/prune": {"csrc/common"},
    "csrc/prune/cpu": {"csrc/common", "csrc/prune"},
    "csrc/prune/cuda": {"csrc/common", "csrc/prune"},
    "csrc/sparse": {"csrc/common", "csrc/sparse/kernels"},
    "csrc/sparse/kernels": set(),
    "csrc/sparse/blocked": {"csrc/common", "csrc/sparse", "csrc/sparse/kernels"},
    "csrc/sparse/engine": {"csrc/common", "csrc/sparse", "csrc/sparse/engine/kernels"},
    "csrc/sparse/engine/kernels": {"csrc/sparse/kernels"},
}


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Checks the contracts in pyproject.toml on the packages in a folder's `python`."""
    config = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    return subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", *config],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "python")},
        capture_output=True,
        text=True,
    )


def test_arrows_run_one_way():
    run = lint_imports(ROOT)
    assert run.returncode == 0, run.stdout
    assert "0 broken" in run.stdout


@pytest.mark.parametrize(
    ("module", "arrow", "broken"),
    (
        ("drive/masks.py", "from .prune import prune", "drive.masks is not allowed to import drive.prune"),
        ("drive/targets/scopes.py", "import drive.experiments.runs.locks", "drive.experiments"),
        ("drive/experiments/data/cache.py", "from drive.experiments.cli import app", "experiments.cli"),
        ("drive_kernels/library.py", "import drive.files", "drive_kernels is not allowed to import drive"),
        ("drive/another.py", "", "drive.another"),
    ),
)
def test_one_arrow_turned_round_is_seen(module: str, arrow: str, broken: str, tmp_path: Path):
    """As is a module that no room has."""
    shutil.copytree(
        ROOT / "python", tmp_path / "python", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    with (tmp_path / "python" / module).open("a") as file:
        file.write(f"\n{arrow}\n")
    run = lint_imports(tmp_path)
    assert run.returncode != 0
    assert broken in run.stdout


def forbidden_includes(root: Path) -> list[str]:
    found = []
    for path in sorted((root / "csrc").rglob("*.*")):
        room = str(path.parent.relative_to(root))
        for header in re.findall(r'^#(?:include|define DRIVE_KERNELS) "(.+)"', path.read_text(), re.M):
            if str(Path("csrc", header).parent) not in {room, *HEADERS[room]}:
                found.append(f"{path.relative_to(root)} includes {header}")
    return found


def test_headers_are_included_one_way(tmp_path: Path):
    assert forbidden_includes(ROOT) == []
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    with (tmp_path / "csrc" / "common" / "recycle.h").open("a") as file:
        file.write('#include "prune/key.h"\n')
    assert forbidden_includes(tmp_path) == ["csrc/common/recycle.h includes prune/key.h"]


def test_the_picture_is_of_this_house(monkeypatch: pytest.MonkeyPatch):
    """Else: python docs/draw_architecture.py."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    import draw_architecture as picture

    assert picture.drawn() == picture.reduced(picture.needs()) | picture.CALLS


SOURCE = {
    folder: [
        path for kind in (".py", ".cpp", ".h", ".cu", ".cuh") for path in (ROOT / folder).rglob(f"*{kind}")
    ]
    for folder in ("csrc", "python", "tests", "benchmarks", "docs", "examples")
}


@pytest.mark.parametrize("folder", SOURCE)
def test_files_and_folders_are_small(folder: str):
    lines = {path: path.read_text().count("\n") for path in SOURCE[folder]}
    files = Counter(path.parent for path in SOURCE[folder])
    assert max(lines.values()) <= 400, max(lines, key=lambda path: lines[path])
    assert max(files.values()) <= 15, files.most_common(1)
