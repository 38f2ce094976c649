"""Who may import whom, and what `import drive` must not need."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DRIVE = ROOT / "python" / "drive"

# The library, lowest first: a module may import those before it. What is not listed serves the command
# line and may import all of these; none of these may import it.
LIBRARY = (
    "files", "figures", "placement", "team", "shards", "packed", "targets", "masks", "finite", "result",
    "copies", "radix", "distributed", "fused", "schedules",
    "gradients", "reference", "capture", "feed", "sgd", "scopes", "structures", "restore", "methods.base",
    "methods.second_order",
    "methods.drive", "methods.snip", "methods.grasp", "methods.synflow", "methods.crop", "methods.early_crop",
    "methods.magnitude", "methods.gradual", "methods.imp", "methods.rigl", "methods.random", "methods",
    "selection", "paths", "prune",
    "sparse.packing", "sparse.layers", "sparse.laid_out", "sparse.masked", "sparse.gpu", "sparse.chains",
    "sparse.measure", "sparse.report",
    "sparse.convert", "sparse",
)  # fmt: skip


def imported(path: Path, package: str) -> set[str]:
    """Full names of the modules that a file imports, relative ones resolved."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - (node.level - 1)] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            found |= {prefix} | {f"{prefix}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "drive_kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_never_import_drive(path: Path):
    assert not {name for name in imported(path, "drive_kernels") if name.split(".")[0] == "drive"}


@pytest.mark.parametrize("module", LIBRARY)
def test_arrows_point_one_way(module: str):
    base = DRIVE / module.replace(".", "/")
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    package = "drive." + module if base.is_dir() else ".".join(["drive", *module.split(".")[:-1]])
    known = {p.stem for p in DRIVE.glob("*.py")} | {p.name for p in DRIVE.iterdir() if p.is_dir()}
    used = {name.removeprefix("drive.") for name in imported(path, package) if name.startswith("drive.")}
    used = {name for name in used if name.split(".")[0] in known or name in LIBRARY}
    allowed = set(LIBRARY[: LIBRARY.index(module)])
    outside = {n for n in used if n not in allowed and not any(n.startswith(f"{a}.") for a in allowed)}
    outside -= {"methods"} if module.startswith("methods") or module == "prune" else set()
    assert not outside, f"{module} must not import {outside}"


def test_import_is_light(tmp_path: Path):
    heavy = "torchvision", "matplotlib", "triton", "sklearn", "lightning", "typer", "rich"
    script = (
        "import sys, torch; before = set(sys.modules); import drive; "
        f"print([m for m in {heavy} if m in set(sys.modules) - before])"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"
