"""How files are named to people: a name is bytes, which need not be text."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

SHOWN = 5  # names of a line


def shown(path: str | Path, within: Path | None = None) -> str:
    """A path, in a folder maybe, as text that can be encoded and printed: bytes that are no UTF-8, and
    controls, are escaped."""
    name = os.fspath(path).removeprefix(f"{within}/") if within else path
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def left_out(skipped: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each reason of `Dataset.skipped`, with the first names."""
    reasons: dict[str, list[str]] = {}
    for name, why in skipped:
        reasons.setdefault(why, []).append(name)
    return [_line(names, why) for why, names in reasons.items()]


def _line(names: list[str], why: str) -> str:
    kind = ("folder" if names[0].endswith("/") else "file") + "s" * (len(names) > 1)
    some = ", ".join(names[:SHOWN]) + ", ..." * (len(names) > SHOWN)
    return f"left out {len(names)} {kind} ({why}): {some}"
