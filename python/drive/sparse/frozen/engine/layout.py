"""What lies how: the lanes of every value, its border, and whose memory it shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from drive.sparse.frozen.graph import Node

from .lanes import Field, Lanes
from .reads import Read, looks_beyond, read_plain, read_window
from .stages import Stage, assign

Shape = tuple[int, ...]
Window = tuple[list[int], list[int], list[int], list[int]]


class Layout:
    """Of the nodes that the engine runs, for one shape of their inputs.

    lanes: of every value that lies in lanes.
    border: rows and columns around its pieces.
    reads: how a node reads its i-th input, by (node's name, i).
    moved_border: of values whose lanes move for a reader, by (value, its lanes then, stride, lowest).
    home: values that are written right into a concatenation's field: (its name, first channel).
    in_place: convolutions whose sums take their residual's place.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        shapes: Mapping[str, Shape],
        constants: Mapping[str, Tensor],
        batch: int,
        threads: int,
    ):
        self._nodes, self._shapes, self._constants = nodes, shapes, constants
        self.lanes = self._cut(batch, threads)
        self.border: dict[str, tuple[int, int]] = dict.fromkeys(self.lanes, (0, 0))
        self.reads: dict[tuple[str, int], Read] = {}
        self.moved_border: dict[tuple[str, Lanes, tuple[int, int], bool], tuple[int, int]] = {}
        self.home: dict[str, tuple[str, int]] = {}
        self.in_place: dict[str, str] = {}
        self._not_negative: set[str] = set()
        # values that have memory of their own, which no slice shares
        sliced = {node.inputs[0] for node in nodes if node.kind == "slice"}
        self._makers = {node.name for node in nodes if node.kind not in ("cat", "slice")} - sliced
        self._survey()

    def window(self, node: Node) -> Window | None:
        """Kernel, stride, padding and dilation, of a node that has a window."""
        o = node.options
        if node.kind == "conv":
            kernel = list(self._constants[o["weight"]].shape[2:])
        elif node.kind in ("max_pool", "avg_pool"):
            kernel = list(o["kernel"])
        else:
            return None
        return kernel, list(o["stride"]), list(o["padding"]), list(o.get("dilation", (1, 1)))

    def field(self, value: str) -> Field:
        """Of a value that has a room of its own."""
        return Field(self.lanes[value], self._shapes[value][1], *self.border[value])

    def as_it_is(self, value: str, read: Read) -> bool:
        """Does that reader find the value as it lies?"""
        return self.lanes[value] == read.lanes and read.moved == (1, 1) and not read.lowest

    def _plane(self, value: str) -> tuple[int, int]:
        height, width = self._shapes[value][2:]
        return (height, width)

    def _cut(self, batch: int, threads: int) -> dict[str, Lanes]:
        stages: dict[tuple[int, int], Stage] = {}
        order: list[tuple[int, int]] = []
        one_size = False

        def reach(value: str) -> Stage:
            plane = self._plane(value)
            if plane not in stages:
                stages[plane] = Stage(plane)
                order.append(plane)
            return stages[plane]

        in_lanes: dict[str, None] = {}
        for node in self._nodes:
            sources = node.inputs[:1] if node.kind == "scale" else node.inputs
            for value in sources:
                if value not in in_lanes:
                    reach(value)
                    in_lanes[value] = None
            if node.kind == "global_mean":
                continue
            stage, window = reach(node.name), self.window(node)
            in_lanes[node.name] = None
            channels = self._shapes[node.name][1]
            if node.kind == "conv":
                stage.taps += int(self._constants[node.options["weight"]].count_nonzero())
            else:
                stage.taps += channels * (window[0][0] * window[0][1] if window else 2)
            source = stages[self._plane(sources[0])]
            moved = channels + sum(self._shapes[value][1] for value in sources)
            stage.traffic += moved
            stage.widest = max(stage.widest, moved)
            if window and max(window[0]) > 1:
                source.channels += self._shapes[sources[0]][1]
            if source is not stage:
                one_size |= order.index(source.plane) > order.index(stage.plane)
                assert window is not None
                stage.strides.add((window[1][0], window[1][1]))
                stage.moved += self._shapes[sources[0]][1]
        found = assign([stages[plane] for plane in order], batch, threads, one_size)
        return {value: found[self._plane(value)] for value in in_lanes}

    def _survey(self) -> None:
        readers: dict[str, list[str]] = {}
        for node in self._nodes:
            for i, value in enumerate(node.inputs):
                readers.setdefault(value, []).append(node.name)
                if value not in self.lanes or node.kind in ("global_mean", "slice"):
                    continue
                read = self._read_of(node, i)
                self.reads[node.name, i] = read
                if self.as_it_is(value, read):
                    self.border[value] = _larger(self.border[value], read.border)
                else:
                    key = (value, read.lanes, read.moved, read.lowest)
                    self.moved_border[key] = _larger(self.moved_border.get(key, (0, 0)), read.border)
            self._note_sign(node)
            if node.kind == "cat":
                self._house(node)
        for node in self._nodes:
            if node.kind == "conv" and len(node.inputs) == 2 and self._can_be_in_place(node, readers):
                self.in_place[node.name] = node.inputs[1]
        self._share_borders()

    def _can_be_in_place(self, node: Node, readers: Mapping[str, Sequence[str]]) -> bool:
        """Nothing else reads the residual from now on, and it has a room of its own."""
        input, residual = node.inputs
        alone = residual in self._makers and not {node.name, residual} & self.home.keys()
        last = readers[residual][-1] == node.name and residual != input
        # those who want other lanes may run in a later phase, though they come before in the graph
        others = any(value == residual for value, *_ in self.moved_border)
        return alone and last and not others and self.as_it_is(residual, self.reads[node.name, 1])

    def _share_borders(self) -> None:
        """Values that share a room have the same border."""
        pairs = [*self.in_place.items(), *((value, cat) for value, (cat, _) in self.home.items())]
        pairs += [(node.name, node.inputs[0]) for node in self._nodes if node.kind == "slice"]
        changed = True
        while changed:
            changed = False
            for a, b in pairs:
                joint = _larger(self.border[a], self.border[b])
                changed |= self.border[a] != joint or self.border[b] != joint
                self.border[a] = self.border[b] = joint

    def _read_of(self, node: Node, i: int) -> Read:
        output = self.lanes[node.name]
        if i > 0 or (window := self.window(node)) is None:
            return read_plain(output)
        input = node.inputs[0]
        read = read_window(self.lanes[input], output, *window)
        if node.kind == "max_pool" and input not in self._not_negative:
            planes = self._shapes[input][2:], self._shapes[node.name][2:]
            if looks_beyond(*planes, *window):
                return Read(read.lanes, read.moved, read.stride, read.border, lowest=True)
        return read

    def _note_sign(self, node: Node) -> None:
        known = node.options.get("act", "") in ("relu", "relu6")
        through = node.kind in ("max_pool", "avg_pool", "cat", "act", "slice")
        if known or (through and all(value in self._not_negative for value in node.inputs)):
            self._not_negative.add(node.name)

    def _house(self, cat: Node) -> None:
        """Inputs of a concatenation that have no other home are written right into its field."""
        first = 0
        for i, value in enumerate(cat.inputs):
            free = value in self._makers and value not in self.home and cat.inputs.count(value) == 1
            if free and self.as_it_is(value, self.reads[cat.name, i]):
                self.home[value] = (cat.name, first)
            first += self._shapes[value][1]


def _larger(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return (max(a[0], b[0]), max(a[1], b[1]))
