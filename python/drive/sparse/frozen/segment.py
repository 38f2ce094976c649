"""A run of nodes as a program of the engine: lanes for every plane, steps, rooms; no Python between them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import lanes as lanes_of
from .graph import Node
from .lanes import Field, Lanes
from .program import Place, Program, Room
from .reads import Read, looks_beyond, read_plain, read_window
from .rooms import Step, arrange, room_size
from .stages import Stage, assign
from .tiles import choose

Shape = tuple[int, ...]


def windowed(node: Node) -> tuple[list[int], list[int], list[int], list[int]] | None:
    """Kernel, stride, padding and dilation of a node that has a window (a convolution's kernel is its weight's)."""
    o = node.options
    if node.kind in ("max_pool", "avg_pool"):
        return list(o["kernel"]), list(o["stride"]), list(o["padding"]), list(o.get("dilation", (1, 1)))
    return None


class Segment:
    """Nodes that the engine runs, for one shape of its inputs.

    Args:
        nodes: in their order, of the kinds that `lower.py` sends here.
        shapes: of all values, by name.
        constants: of the graph.
        outside: names of the values of this segment that others read.
        threads: that will run it.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        shapes: Mapping[str, Shape],
        constants: Mapping[str, Tensor],
        outside: set[str],
        threads: int,
    ):
        self.nodes, self.shapes, self.constants = nodes, shapes, constants
        self.threads = threads
        made = {node.name for node in nodes}
        self.inputs = list(dict.fromkeys(v for n in nodes for v in n.inputs if v not in made))
        self.outputs = [n.name for n in nodes if n.name in outside or n.kind == "global_mean"]
        self.batch = shapes[nodes[0].inputs[0]][0]
        self._plain = {name: i for i, name in enumerate([*self.inputs, *self.outputs])}
        self._lanes = self._cut()
        self._survey()
        self._steps: dict[int, list[Step]] = {}
        self._places: dict[str, Place] = {}
        self._moved: dict[tuple[str, Lanes, tuple[int, int], bool], Place] = {}
        for node in nodes:
            self._emit(node)
        self._finish()

    # ---- What lies how ----

    def _plane(self, value: str) -> tuple[int, int]:
        height, width = self.shapes[value][2:]
        return (height, width)

    def _window(self, node: Node) -> tuple[list[int], list[int], list[int], list[int]] | None:
        if node.kind == "conv":
            o = node.options
            kernel = list(self.constants[o["weight"]].shape[2:])
            return kernel, list(o["stride"]), list(o["padding"]), list(o["dilation"])
        return windowed(node)

    def _cut(self) -> dict[str, Lanes]:
        """Lanes of every value that lies in lanes."""
        stages: dict[tuple[int, int], Stage] = {}
        order: list[tuple[int, int]] = []
        one_size = False

        def reach(value: str) -> Stage:
            plane = self._plane(value)
            if plane not in stages:
                stages[plane] = Stage(plane)
                order.append(plane)
            return stages[plane]

        in_lanes: list[str] = []
        for node in self.nodes:
            sources = node.inputs[:1] if node.kind == "scale" else node.inputs
            for value in sources:
                if value not in in_lanes:
                    reach(value)
                    in_lanes.append(value)
            if node.kind == "global_mean":
                continue
            stage, window = reach(node.name), self._window(node)
            in_lanes.append(node.name)
            channels = self.shapes[node.name][1]
            if node.kind == "conv":
                stage.taps += int(self.constants[node.options["weight"]].count_nonzero())
            else:
                stage.taps += channels * (window[0][0] * window[0][1] if window else 2)
            source = stages[self._plane(sources[0])]
            moved = channels + sum(self.shapes[value][1] for value in sources)
            stage.traffic += moved
            stage.widest = max(stage.widest, moved)
            if window and max(window[0]) > 1:
                source.channels += self.shapes[sources[0]][1]
            if source is not stage:
                one_size |= order.index(source.plane) > order.index(stage.plane)
                assert window is not None
                stage.strides.add((window[1][0], window[1][1]))
                stage.moved += self.shapes[sources[0]][1]
        found = assign([stages[plane] for plane in order], self.batch, self.threads, one_size)
        return {value: found[self._plane(value)] for value in in_lanes}

    def _survey(self) -> None:
        """Borders, values that lie in a concatenation's field, and sums that take their residual's place."""
        self._border: dict[str, tuple[int, int]] = {value: (0, 0) for value in self._lanes}
        self._reads: dict[tuple[str, int], Read] = {}
        self._moved_border: dict[tuple[str, Lanes, tuple[int, int], bool], tuple[int, int]] = {}
        self._home: dict[str, tuple[str, int]] = {}
        self._not_negative: set[str] = set()
        readers: dict[str, list[str]] = {}
        for node in self.nodes:
            for i, value in enumerate(node.inputs):
                readers.setdefault(value, []).append(node.name)
                if value not in self._lanes or node.kind == "global_mean":
                    continue
                read = self._read_of(node, i)
                self._reads[node.name, i] = read
                if self._as_it_is(value, read):
                    self._border[value] = _larger(self._border[value], read.border)
                else:
                    key = (value, read.lanes, read.moved, read.lowest)
                    self._moved_border[key] = _larger(self._moved_border.get(key, (0, 0)), read.border)
            self._note_sign(node)
            if node.kind == "cat":
                self._house(node)
        for group in self._housed():
            border = (0, 0)
            for value in group:
                border = _larger(border, self._border[value])
            for value in group:
                self._border[value] = border
        self._in_place = {}
        for node in self.nodes:
            if node.kind != "conv" or len(node.inputs) < 2:
                continue
            input, residual = node.inputs
            alone = not {node.name, residual} & self._home.keys() and residual in self._makers()
            if alone and readers[residual][-1] == node.name and residual != input and self._here(node, residual):
                self._in_place[node.name] = residual
                joint = _larger(self._border[node.name], self._border[residual])
                self._border[node.name] = self._border[residual] = joint
        self._spread_borders()

    def _makers(self) -> set[str]:
        return {node.name for node in self.nodes if node.kind != "cat"}

    def _here(self, node: Node, value: str) -> bool:
        return self._as_it_is(value, self._reads[node.name, node.inputs.index(value)])

    def _spread_borders(self) -> None:
        """Values that share a room share its border."""
        changed = True
        while changed:
            changed = False
            for name, residual in self._in_place.items():
                joint = _larger(self._border[name], self._border[residual])
                changed |= self._border[name] != joint or self._border[residual] != joint
                self._border[name] = self._border[residual] = joint

    def _read_of(self, node: Node, i: int) -> Read:
        output = self._lanes[node.name]
        if i > 0 or (window := self._window(node)) is None:
            return read_plain(output)
        input = node.inputs[0]
        read = read_window(self._lanes[input], output, *window)
        if node.kind == "max_pool" and input not in self._not_negative:
            planes = self.shapes[input][2:], self.shapes[node.name][2:]
            if looks_beyond(*planes, *window):
                return Read(read.lanes, read.moved, read.stride, read.border, lowest=True)
        return read

    def _as_it_is(self, value: str, read: Read) -> bool:
        return self._lanes[value] == read.lanes and read.moved == (1, 1) and not read.lowest

    def _note_sign(self, node: Node) -> None:
        known = node.options.get("act", "") in ("relu", "relu6")
        through = node.kind in ("max_pool", "avg_pool", "cat", "act")
        if known or (through and all(value in self._not_negative for value in node.inputs)):
            self._not_negative.add(node.name)

    def _house(self, cat: Node) -> None:
        """Inputs of a concatenation that have no other home are written right into its field."""
        first, makers = 0, self._makers()
        for i, value in enumerate(cat.inputs):
            free = value in makers and value not in self._home and cat.inputs.count(value) == 1
            if free and self._as_it_is(value, self._reads[cat.name, i]):
                self._home[value] = (cat.name, first)
            first += self.shapes[value][1]

    def _housed(self) -> list[list[str]]:
        groups: dict[str, list[str]] = {}
        for value, (cat, _) in self._home.items():
            groups.setdefault(cat, [cat]).append(value)
        return list(groups.values())

    # ---- Steps ----

    def _add(self, lanes: Lanes, reads: Sequence[Place | None], writes: Sequence[Place], write: object) -> None:
        step = Step(
            lanes.images, [p.room for p in reads if p], [p.room for p in writes], write  # type: ignore[arg-type]
        )
        self._steps.setdefault(lanes.images, []).append(step)

    def _parts(self, lanes: Lanes) -> int:
        """Threads that share a unit's step."""
        return self.threads if self._units(lanes.images) < self.threads else 1

    def _units(self, images: int) -> int:
        return -(-self.batch // images)

    def _field(self, value: str) -> Field:
        top, left = self._border[value]
        return Field(self._lanes[value], self.shapes[value][1], top, left)

    def _room_for(self, value: str) -> Place:
        """Where a value is to be written."""
        if value in self._places:  # a concatenation some of whose inputs have been written
            return self._places[value]
        if value in self._in_place:
            place = self._places[self._in_place[value]]
        elif value in self._home:
            cat, first = self._home[value]
            whole = self._room_for(cat)
            place = Place(whole.room, whole.field, first)
        else:
            field = self._field(value)
            place = Place(Room(room_size(field.floats)), field)
        self._places[value] = place
        return place

    def _source(self, value: str) -> Place:
        """Where a value lies; what comes from outside enters at its first use."""
        if value not in self._places:
            field, channels = self._field(value), self.shapes[value][1]
            place = Place(Room(room_size(field.floats)), field)
            area = field.lanes.height * field.lanes.width
            offsets, masks = lanes_of.plain_offsets(field, area * channels, True)
            number = self._plain[value]
            self._add(
                field.lanes, [], [place], lambda p: p.enter(number, place, offsets, masks, channels)
            )
            self._places[value] = place
        return self._places[value]

    def _read(self, node: Node, i: int) -> Place:
        """Input i of a node as the node wants it."""
        value, read = node.inputs[i], self._reads[node.name, i]
        source = self._source(value)
        if self._as_it_is(value, read):
            return source
        key = (value, read.lanes, read.moved, read.lowest)
        if key not in self._moved:
            top, left = self._moved_border[key]
            channels = self.shapes[value][1]
            field = Field(read.lanes, channels, top, left)
            target = Place(Room(room_size(field.floats)), field)
            moves = lanes_of.between(source.field, source.room.floats, field, read.moved)
            units, parts = max(read.lanes.images // source.field.lanes.images, 1), self._parts(read.lanes)
            self._add(
                read.lanes,
                [source],
                [target],
                lambda p: p.move(source, target, units, moves, channels, parts, read.lowest),
            )
            self._moved[key] = target
        return self._moved[key]

    def _emit(self, node: Node) -> None:
        emit = {"add": self._add_node}.get(node.kind) or getattr(self, f"_{node.kind}")
        emit(node)
        if node.kind == "global_mean":
            return
        place, channels = self._places[node.name], self.shapes[node.name][1]
        lanes = place.field.lanes
        if node.name in self._plain:
            number, field = self._plain[node.name], Field(lanes, channels)
            offsets, masks = lanes_of.plain_offsets(field, lanes.height * lanes.width * channels, False)
            self._add(lanes, [place], [], lambda p: p.leave(place, number, offsets, masks, channels))
        # a concatenation's channels have their borders from those who wrote them, or from here
        if node.kind != "cat" and place.field.top + place.field.left > 0:
            moves, parts = lanes_of.halo(place.field), self._parts(lanes)
            if moves.positions.numel():
                self._add(
                    lanes, [place], [place], lambda p: p.move(place, place, 1, moves, channels, parts, False)
                )

    def _conv(self, node: Node) -> None:
        o = node.options
        weight = self.constants[o["weight"]]
        bias = self.constants[o["bias"]] if o["bias"] else torch.zeros(weight.shape[0])
        self._convolve(node, weight, bias, o["groups"], o["act"])

    def _avg_pool(self, node: Node) -> None:
        """A convolution of each channel by itself, all of whose weights are alike."""
        channels, kernel = self.shapes[node.name][1], node.options["kernel"]
        weight = torch.full((channels, 1, *kernel), 1 / (kernel[0] * kernel[1]))
        self._convolve(node, weight, torch.zeros(channels), channels, "")

    def _convolve(self, node: Node, weight: Tensor, bias: Tensor, groups: int, act: str) -> None:
        window = self._window(node)
        assert window is not None
        kernel, _, padding, dilation = window
        source, read = self._read(node, 0), self._reads[node.name, 0]
        residual = self._read(node, 1) if len(node.inputs) > 1 else None
        target = self._room_for(node.name)
        lanes = target.field.lanes
        span = (1 + (kernel[0] - 1) * dilation[0], 1 + (kernel[1] - 1) * dilation[1])
        taps = int(weight.count_nonzero())
        walk = choose(
            lanes, weight.shape[1], weight.shape[0], taps, span, read.stride, groups, self._parts(lanes)
        )
        packed = torch.ops.drive.engine_pack(
            weight.contiguous(), groups, walk.block, walk.in_block, padding, dilation,
            [source.field.channels, source.field.pitch],
        )  # fmt: skip
        in_blocks = -(-weight.shape[1] // walk.in_block)
        self._add(
            lanes,
            [source, residual],
            [target],
            lambda p: p.conv(
                source, target, residual, packed, bias, walk.block, in_blocks, read.stride, walk.tile, act
            ),
        )

    def _max_pool(self, node: Node) -> None:
        kernel, _, padding, dilation = self._window(node) or ([], [], [], [])
        source, read = self._read(node, 0), self._reads[node.name, 0]
        target, channels = self._room_for(node.name), self.shapes[node.name][1]
        self._add(
            target.field.lanes,
            [source],
            [target],
            lambda p: p.pool(source, target, kernel, read.stride, padding, dilation, channels),
        )

    def _act(self, node: Node) -> None:
        self._sum(self._read(node, 0), None, self._room_for(node.name), node)

    def _add_node(self, node: Node) -> None:
        self._sum(self._read(node, 0), self._read(node, 1), self._room_for(node.name), node)

    def _sum(self, a: Place, b: Place | None, target: Place, node: Node) -> None:
        channels, act = self.shapes[node.name][1], node.options.get("act", "")
        self._add(target.field.lanes, [a, b], [target], lambda p: p.add(a, b, target, channels, act))

    def _cat(self, node: Node) -> None:
        whole, first = self._room_for(node.name), 0
        for i, value in enumerate(node.inputs):
            channels = self.shapes[value][1]
            if self._home.get(value) != (node.name, first):
                part = Place(whole.room, whole.field, first)
                self._copy(self._read(node, i), part, channels)
            first += channels

    def _copy(self, source: Place, target: Place, channels: int) -> None:
        lanes = target.field.lanes
        self._add(lanes, [source], [target], lambda p: p.add(source, None, target, channels, ""))
        if target.field.top + target.field.left > 0:
            moves, parts = lanes_of.halo(target.field), self._parts(lanes)
            self._add(
                lanes, [target], [target], lambda p: p.move(target, target, 1, moves, channels, parts, False)
            )

    def _scale(self, node: Node) -> None:
        source, target = self._read(node, 0), self._room_for(node.name)
        number, channels = self._plain[node.inputs[1]], self.shapes[node.name][1]
        self._add(target.field.lanes, [source], [target], lambda p: p.scale(source, target, number, channels))

    def _global_mean(self, node: Node) -> None:
        source, number = self._source(node.inputs[0]), self._plain[node.name]
        lanes, channels = source.field.lanes, self.shapes[node.inputs[0]][1]
        masks, parts = lanes_of.masks(lanes), self._parts(lanes)
        self._add(lanes, [source], [], lambda p: p.mean(source, number, masks, channels, parts))

    # ---- The program ----

    def _finish(self) -> None:
        sizes = sorted(self._steps)
        units = [self._units(images) for images in sizes]
        ratios = [1, *(b // a for a, b in itertools.pairwise(sizes))]
        self._chained = sum(u >= self.threads for u in units)
        steps = []
        for phase, images in enumerate(sizes):
            for step in self._steps[images]:
                step.phase = phase
                steps.append(step)
        floats = arrange(steps, units, ratios, self._chained, self.threads)
        program, phases = Program(), []
        for phase in range(len(sizes)):
            begin = len(program.numbers)
            for step in steps:
                if step.phase == phase:
                    step.write(program)
            phases.append((units[phase], ratios[phase], begin, len(program.numbers)))
        self._sums = (floats, room_size(1_000_000 // 4 + 16 * 28 * 16))
        self._program, self._constants = program.tensor(), program.constants
        self._phases = torch.tensor(phases, dtype=torch.int64)
        self._bytes = 4 * (floats + self._sums[1] * self.threads)
        self._arenas: list[Tensor] = []
        del self._steps, self._places, self._moved

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The values `outputs` of the values `inputs`, contiguous float32."""
        outputs = [torch.empty(self.shapes[name]) for name in self.outputs]
        plain = [*(t.contiguous() for t in inputs), *outputs]
        try:
            arena = self._arenas.pop()  # one a call that is running
        except IndexError:
            arena = torch.ops.drive.engine_arena(self._bytes)
        try:
            torch.ops.drive.engine_run(
                plain, self._program, self._phases, self._chained, self._constants, arena, self._sums,
                self.batch, self.threads,
            )  # fmt: skip
        finally:
            self._arenas.append(arena)
        return outputs


def _larger(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return (max(a[0], b[0]), max(a[1], b[1]))
