"""Draws docs/architecture.svg from the imports and includes of the source: python docs/draw_architecture.py

Needs Graphviz. A box is a room of the contracts in pyproject.toml, or a folder of csrc; an arrow goes from it
to a room that it needs. What a room also reaches by way of another is left out.
"""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import grimp

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "architecture.svg"
CLUSTERS = {
    "drive.experiments": "#f6e3c5", "drive": "#d7e8f7", "drive_kernels": "#d9efd9", "csrc": "#eadcf2",
}  # fmt: skip
# By way of PyTorch's dispatcher, which knows what the compiled part registers.
CALLS = {("drive_kernels.prune", "csrc/prune"), ("drive_kernels.sparse", "csrc/sparse")}

Arrows = set[tuple[str, str]]


def rooms() -> list[str]:
    """Names of modules, in the order of the contracts, and of folders of csrc."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    modules = [
        f"{contract['containers'][0]}.{name.strip()}"
        for contract in contracts
        if "containers" in contract
        for layer in contract["layers"]
        for name in layer.split("|")
    ]
    folders = {str(path.parent.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*/*.*")}
    return [room for room in modules if room not in ("drive.__main__", "drive.experiments")] + sorted(folders)


def needs() -> Arrows:
    """Which room imports or includes which, anywhere in it."""
    names = rooms()
    graph = grimp.build_graph("drive", "drive_kernels", cache_dir=None)
    found = set()
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            found.add((room_of(importer, ".", names), room_of(imported, ".", names)))
    for path in (ROOT / "csrc").rglob("*.*"):
        for header in re.findall(r'^#(?:include|define DRIVE_KERNELS) "(.+)"', path.read_text(), re.M):
            found.add(
                (room_of(str(path.relative_to(ROOT)), "/", names), room_of(f"csrc/{header}", "/", names))
            )
    return {(a, b) for a, b in found if a and b and a != b}


def room_of(name: str, separator: str, names: list[str]) -> str:
    """The innermost room that a module or file is in; "" if none."""
    inside = (room for room in names if name == room or name.startswith(room + separator))
    return max(inside, key=len, default="")


def reduced(arrows: Arrows) -> Arrows:
    """Without those that a longer way replaces."""
    names = rooms()
    reach = {room: {b for a, b in arrows if a == room} for room in names}
    for middle, start in product(names, names):  # Warshall's algorithm
        if middle in reach[start]:
            reach[start] |= reach[middle]
    return {(a, b) for a, b in arrows if not any(b in reach[c] for x, c in arrows if x == a)}


def picture() -> str:
    """In Graphviz's language."""
    names = rooms()
    clusters = []
    for cluster, colour in CLUSTERS.items():
        own = [
            f'"{room}" [label="{room[len(cluster) + 1 :]}"]' for room in names if cluster_of(room) == cluster
        ]
        clusters.append(
            f'subgraph "cluster_{cluster}" {{ label="{cluster}" style="rounded" color="{colour}" '
            f'node [fillcolor="{colour}"] {"; ".join(own)} }}'
        )
    arrows = sorted(reduced(needs()), key=lambda pair: [*map(names.index, pair)])
    return "\n".join((
        "digraph {",
        'graph [fontname="sans-serif" fontsize=13 ranksep=0.3 nodesep=0.25 newrank=true]',
        'node [fontname="sans-serif" fontsize=11 shape=box style="filled,rounded" height=0.3]',
        'edge [color="#555555" arrowsize=0.6]',
        *clusters,
        *(f'"{a}" -> "{b}"' for a, b in arrows),
        *(f'"{a}" -> "{b}" [style=dashed]' for a, b in sorted(CALLS)),
        "}\n",
    ))  # fmt: skip


def cluster_of(room: str) -> str:
    return next(cluster for cluster in CLUSTERS if re.match(rf"{cluster}[./]", room))


def drawn() -> Arrows:
    """The arrows in the picture as it is."""
    titles = re.findall(r"<title>(.+)&#45;&gt;(.+)</title>", PICTURE.read_text())
    return {(a, b) for a, b in titles}


if __name__ == "__main__":
    dot = subprocess.run(["dot", "-Tsvg"], input=picture(), capture_output=True, text=True, check=True)
    PICTURE.write_text(dot.stdout)
