"""Folders that one process works in at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether the folder is ours alone; False at once, or with `wait` as soon as it is free.

    The lock is the kernel's, of an open file: it ends with the process, however that ends, and holds between
    threads and containers, too.
    """
    path = folder / LOCK
    while True:
        with path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            if _is_at(path, file.fileno()):
                yield True
                return
            # somebody who gave the folder up has removed this file meanwhile: another may be there


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
