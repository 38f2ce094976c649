"""What `pytest benchmarks/ --benchmark-only --benchmark-json bench.json` has written, as a page.

python -m benchmarks.table bench.json docs/results/bench.md
"""

from __future__ import annotations

import argparse
import json
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.pages import markdown
from drive.files import write_atomic

HEADER = """# What pruning costs

{facts}

`make bench`. What is timed was compared before with the reference, or with the dense layer. Variants run one
after the other, not in turns: where some percent matter, [cpu.md](cpu.md) and [sparse-cpu.md](sparse-cpu.md)
have the better figures.
"""
COLUMNS = ["", "median, ms", "least, ms", "most, ms", "rounds", "times the first"]
NOT_FACTS = "device", "entries"


def page(found: dict[str, Any]) -> str:
    """A table for each group, in the order in which they ran."""
    benchmarks = found["benchmarks"]
    extra = benchmarks[0]["extra_info"]
    facts = [f"{name} {value}" for name, value in extra.items() if name not in NOT_FACTS]
    parts = [HEADER.format(facts=", ".join([extra["device"], *facts]))]
    for group, members in groupby(benchmarks, lambda benchmark: benchmark["group"]):
        parts.append(f"## {group}\n\n{markdown(COLUMNS, rows([*members]))}\n")
    return "\n".join(parts)


def rows(members: list[dict[str, Any]]) -> list[list[str]]:
    first = members[0]["stats"]["median"]
    return [
        [
            variant(member["param"]),
            *(f"{1e3 * member['stats'][which]:,.3f}" for which in ("median", "min", "max")),
            str(member["stats"]["rounds"]),
            f"{member['stats']['median'] / first:.3g}",
        ]
        for member in members
    ]


def variant(param: str) -> str:
    """The last of a benchmark's parameters: what its group has several of."""
    return param.rpartition("-")[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    write_atomic(options.out, page(json.loads(options.json.read_text())).encode())


if __name__ == "__main__":
    main()
