"""What the package costs, and what else would: run from the repository's root, `python -m benchmarks...`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
