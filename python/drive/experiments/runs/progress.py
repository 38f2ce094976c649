"""Bars for work that takes its time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def task(progress: Progress, title: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar that disappears when its work is done; what it gives advances it by one."""
    bar = progress.add_task(title, total=total)
    try:
        yield lambda: progress.advance(bar)
    finally:
        progress.remove_task(bar)


def bars(console: Console) -> Progress:
    """Progress bars with counts and the time that has passed."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console)
