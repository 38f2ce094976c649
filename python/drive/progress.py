"""How far a loop has come, on stderr: a bar where rich is installed, else plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

SECONDS = 5  # between two lines

Step = TypeVar("Step")


def tracked(steps: Sequence[Step], what: str) -> Iterable[Step]:
    """The same steps, told while they are taken; not where nobody looks, since stderr is no terminal."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return _told(steps, what) if sys.stderr is not None and sys.stderr.isatty() else steps
    console = Console(stderr=True)
    seen = console.is_terminal or console.is_jupyter
    return track(steps, description=what, console=console, disable=not seen)


def _told(steps: Sequence[Step], what: str) -> Iterator[Step]:
    begin = said = time.monotonic()
    for done, step in enumerate(steps, start=1):
        yield step
        now = time.monotonic()
        if done == len(steps) or now - said >= SECONDS:
            print(f"{what}: {done} of {len(steps)}, {now - begin:.0f} s", file=sys.stderr, flush=True)
            said = now
