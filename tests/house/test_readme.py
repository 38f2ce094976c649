"""Every Python snippet of the README and of the documentation runs, and the commands README names exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [README, *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))]
SNIPPETS = [snippet for page in PAGES for snippet in re.findall(r"```python\n(.*?)```", page, re.S)]
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [line.split("#")[0].split() for block in BLOCKS for line in block.splitlines()]


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_runs(number: int, tmp_path: Path):
    run = subprocess.run(
        [sys.executable, "-c", SNIPPETS[number]], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "drive"], ids=" ".join)
def test_command_exists(command: list[str]):
    program = Path(sys.executable).parent / command[0]
    run = subprocess.run([str(program), *command[1:]], capture_output=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "make"], ids=" ".join)
def test_make_target_exists(command: list[str]):
    run = subprocess.run(["make", "-n", *command[1:]], cwd=ROOT, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr


def test_files_exist():
    for path in re.findall(r"\]\((docs/[^)#]+)\)", README):
        assert (ROOT / path).exists(), path


def test_figures_are_those_of_the_results():
    pages = ("cpu.md", "sparse-cpu.md")
    results = [line for page in pages for line in (ROOT / "docs/results" / page).read_text().splitlines()]
    rows = [line for line in README.splitlines() if line.startswith("| ")]
    assert rows and all(row in results for row in rows)
