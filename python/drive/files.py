"""Files that are written whole or not at all."""

import os
from collections.abc import Iterable
from pathlib import Path


def write_atomic(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Write a file, in pieces maybe; a crash or a kill at any moment leaves the old or the new content."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
