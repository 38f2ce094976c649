"""The command `drive`, also as `python -m drive`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, if what it needs is installed; the exit status."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(f"drive: {error.name} must be installed (pip install 'drive-prune[cli]')", file=sys.stderr)
        return 2
    from .experiments.cli.app import main

    return main(arguments)


if __name__ == "__main__":  # also imported, by processes that share a training
    sys.exit(main())
