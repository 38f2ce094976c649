"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomic(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Write a file, in pieces maybe, as `atomic` does."""
    with atomic(path) as partial, partial.open("wb") as file:
        file.writelines([content] if isinstance(content, bytes) else content)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """An empty file to write to, which takes the place of `path` in the end: until then, and if anything
    raises, there is the old content; a kill at any moment leaves the old or the new one.

    It lies beside `path` under a name that nobody else has: threads may write at once, and containers, in
    which every process is number 1. Of a symbolic link, what it leads to is written. Permissions stay.

    Raises:
        OSError: `path` is a folder or a special file (a pipe, a device); whatever writing raises.
    """
    path = Path(os.path.realpath(path))
    regular = check_regular(path)
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb"):
            pass
        if regular:
            shutil.copymode(path, partial)
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_regular(path: Path) -> bool:
    """Whether there is such a file; OSError if it is none: reading or writing that may never end."""
    if not path.exists() or path.is_file():
        return path.exists()
    number = errno.EISDIR if path.is_dir() else errno.EINVAL
    raise OSError(number, "must be a regular file, got a folder or a special file", str(path))
