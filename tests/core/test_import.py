"""What `import drive` must not need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


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
