"""The nodes that the engine runs, as programs of it: steps in lanes, rooms for their values.

Where other nodes need what these make, and these what others make, there are several programs, levels, which
run with the others' nodes between them; values stay where they lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from drive.sparse.frozen.graph import Node

from . import lanes as lanes_of
from .lanes import Field, Lanes
from .layout import Layout, Shape
from .program import Place, Program, Room
from .rooms import Phase, Step, arrange, room_size
from .tiles import MOST_WAITING, Work, choose

# Room for the sums of a block of outputs (tiles.py), and for the last tile's.
_SUMS = 1_000_000 // 4

_ABSENT = torch.empty(0)  # an input that is not there yet


class Engine:
    """Programs for one shape of the inputs.

    Args:
        levels: nodes in their order, of the kinds that lower.py sends here.
        shapes: of all values, by name.
        constants: of the graph.
        outside: names of the values that others read.
        threads: that will run it.
    """

    def __init__(
        self,
        levels: Sequence[Sequence[Node]],
        shapes: Mapping[str, Shape],
        constants: Mapping[str, Tensor],
        outside: set[str],
        threads: int,
    ):
        nodes = [node for level in levels for node in level]
        made = {node.name for node in nodes}
        self._shapes, self._constants, self._threads = shapes, constants, threads
        self.inputs = list(dict.fromkeys(v for n in nodes for v in n.inputs if v not in made))
        self.outputs = [n.name for n in nodes if n.name in outside or n.kind == "global_mean"]
        self.batch = shapes[nodes[0].inputs[0]][0]
        self.layout = Layout(nodes, shapes, constants, self.batch, threads)
        self._plain = {name: i for i, name in enumerate([*self.inputs, *self.outputs])}
        self._steps: dict[tuple[int, int], list[Step]] = {}  # by level and images of a unit
        self._places: dict[str, Place] = {}
        self._moved: dict[tuple[str, Lanes, tuple[int, int], bool], Place] = {}
        for self._level, level in enumerate(levels):
            for node in level:
                self._emit(node)
        self._write()

    def _step(self, lanes: Lanes, reads: Sequence[Place | None], writes: Sequence[Place], write: Any) -> None:
        step = Step([p.room for p in reads if p], [p.room for p in writes], write)
        self._steps.setdefault((self._level, lanes.images), []).append(step)

    def _parts(self, lanes: Lanes) -> int:
        """Threads that share a unit's step."""
        return self._threads if self._units(lanes.images) < self._threads else 1

    def _units(self, images: int) -> int:
        return -(-self.batch // images)

    def _room_for(self, value: str) -> Place:
        """Where a value is to be written."""
        if value in self._places:  # a concatenation some of whose inputs have been written
            return self._places[value]
        if value in self.layout.in_place:
            place = self._places[self.layout.in_place[value]]
        elif value in self.layout.home:
            cat, first = self.layout.home[value]
            whole = self._room_for(cat)
            place = Place(whole.room, whole.field, first)
        else:
            field = self.layout.field(value)
            place = Place(Room(room_size(field.floats)), field)
        self._places[value] = place
        return place

    def _source(self, value: str) -> Place:
        """Where a value lies; what comes from outside enters at its first use."""
        if value not in self._places:
            field, channels = self.layout.field(value), self._shapes[value][1]
            place = Place(Room(room_size(field.floats)), field)
            area = field.lanes.height * field.lanes.width
            offsets, masks = lanes_of.plain_offsets(field, area * channels, True)
            number = self._plain[value]
            self._step(field.lanes, [], [place], lambda p: p.enter(number, place, offsets, masks, channels))
            self._places[value] = place
        return self._places[value]

    def _read(self, node: Node, i: int) -> Place:
        """Input i of a node as the node wants it."""
        value, read = node.inputs[i], self.layout.reads[node.name, i]
        source = self._source(value)
        if self.layout.as_it_is(value, read):
            return source
        key = (value, read.lanes, read.moved, read.lowest)
        if key not in self._moved:
            top, left = self.layout.moved_border[key]
            channels = self._shapes[value][1]
            field = Field(read.lanes, channels, top, left)
            target = Place(Room(room_size(field.floats)), field)
            moves = lanes_of.between(source.field, source.room.floats, field, read.moved)
            units, parts = max(read.lanes.images // source.field.lanes.images, 1), self._parts(read.lanes)
            self._step(
                read.lanes,
                [source],
                [target],
                lambda p: p.move(source, target, units, moves, channels, parts, read.lowest),
            )
            self._moved[key] = target
        return self._moved[key]

    def _emit(self, node: Node) -> None:
        getattr(self, f"_{node.kind}")(node)
        if node.kind == "global_mean":
            return
        place, channels = self._places[node.name], self._shapes[node.name][1]
        lanes = place.field.lanes
        if node.name in self._plain:
            number, field = self._plain[node.name], Field(lanes, channels)  # of a plain tensor: no border
            offsets, masks = lanes_of.plain_offsets(field, lanes.height * lanes.width * channels, False)
            self._step(lanes, [place], [], lambda p: p.leave(place, number, offsets, masks, channels))
        # a concatenation's channels have their borders from those who wrote them, or from here
        if node.kind not in ("cat", "slice"):
            self._fill_border(place, channels)

    def _fill_border(self, place: Place, channels: int) -> None:
        lanes = place.field.lanes
        if place.field.top + place.field.left == 0:
            return
        moves, parts = lanes_of.halo(place.field), self._parts(lanes)
        self._step(lanes, [place], [place], lambda p: p.move(place, place, 1, moves, channels, parts, False))

    def _conv(self, node: Node) -> None:
        o = node.options
        weight = self._constants[o["weight"]]
        bias = self._constants[o["bias"]] if o["bias"] else torch.zeros(weight.shape[0])
        self._convolve(node, weight, bias, o["groups"], o["act"])

    def _avg_pool(self, node: Node) -> None:
        """A convolution of each channel by itself, all of whose weights are alike."""
        channels, kernel = self._shapes[node.name][1], node.options["kernel"]
        weight = torch.full((channels, 1, *kernel), 1 / (kernel[0] * kernel[1]))
        self._convolve(node, weight, torch.zeros(channels), channels, "")

    def _convolve(self, node: Node, weight: Tensor, bias: Tensor, groups: int, act: str) -> None:
        window = self.layout.window(node)
        assert window is not None
        kernel, _, padding, dilation = window
        source, read = self._read(node, 0), self.layout.reads[node.name, 0]
        residual = self._read(node, 1) if len(node.inputs) > 1 else None
        target = self._room_for(node.name)
        lanes = target.field.lanes
        span = (1 + (kernel[0] - 1) * dilation[0], 1 + (kernel[1] - 1) * dilation[1])
        taps = int(weight.count_nonzero())
        work = Work(lanes, weight.shape[1], weight.shape[0], taps, span, read.stride, self._parts(lanes))
        walk = choose(work, groups)
        packed = torch.ops.drive.engine_pack(
            weight.contiguous(), groups, walk.block, walk.in_block, padding, dilation,
            [source.field.channels, source.field.pitch],
        )  # fmt: skip
        in_blocks = -(-weight.shape[1] // walk.in_block)
        self._step(
            lanes,
            [source, residual],
            [target],
            lambda p: p.conv(
                source, target, residual, packed, bias, walk.block, in_blocks, read.stride, walk.tile, act
            ),
        )

    def _max_pool(self, node: Node) -> None:
        kernel, _, padding, dilation = self.layout.window(node) or ([], [], [], [])
        source, read = self._read(node, 0), self.layout.reads[node.name, 0]
        target, channels = self._room_for(node.name), self._shapes[node.name][1]
        self._step(
            target.field.lanes,
            [source],
            [target],
            lambda p: p.pool(source, target, kernel, read.stride, padding, dilation, channels),
        )

    def _act(self, node: Node) -> None:
        self._sum(self._read(node, 0), None, self._room_for(node.name), node)

    def _add(self, node: Node) -> None:
        self._sum(self._read(node, 0), self._read(node, 1), self._room_for(node.name), node)

    def _sum(self, a: Place, b: Place | None, target: Place, node: Node) -> None:
        channels, act = self._shapes[node.name][1], node.options.get("act", "")
        self._step(target.field.lanes, [a, b], [target], lambda p: p.add(a, b, target, channels, act))

    def _cat(self, node: Node) -> None:
        whole, first = self._room_for(node.name), 0
        for i, value in enumerate(node.inputs):
            channels = self._shapes[value][1]
            if self.layout.home.get(value) != (node.name, first):
                part = Place(whole.room, whole.field, first)
                self._copy(self._read(node, i), part, channels)
            first += channels

    def _copy(self, source: Place, target: Place, channels: int) -> None:
        lanes = target.field.lanes
        self._step(lanes, [source], [target], lambda p: p.add(source, None, target, channels, ""))
        self._fill_border(target, channels)

    def _slice(self, node: Node) -> None:
        whole = self._source(node.inputs[0])
        self._places[node.name] = Place(whole.room, whole.field, whole.first + node.options["start"])

    def _scale(self, node: Node) -> None:
        source, target = self._read(node, 0), self._room_for(node.name)
        number, channels = self._plain[node.inputs[1]], self._shapes[node.name][1]
        self._step(
            target.field.lanes, [source], [target], lambda p: p.scale(source, target, number, channels)
        )

    def _global_mean(self, node: Node) -> None:
        source, number = self._source(node.inputs[0]), self._plain[node.name]
        lanes, channels = source.field.lanes, self._shapes[node.inputs[0]][1]
        masks, parts = lanes_of.masks(lanes), self._parts(lanes)
        self._step(lanes, [source], [], lambda p: p.mean(source, number, masks, channels, parts))

    # ---- Programs ----

    def _write(self) -> None:
        """Rooms, then the steps as numbers."""
        phases: list[Phase] = []
        for level in range(self._level + 1):
            before = 0
            for images in sorted(images for at, images in self._steps if at == level):
                units = self._units(images)
                ratio = images // before if before else 1
                phases.append(Phase(level, units, ratio, units >= self._threads, self._steps[level, images]))
                before = images
        floats = arrange(phases, self._threads)
        self._sums = (floats, room_size(MOST_WAITING // 4))
        self._bytes = 4 * (floats + self._sums[1] * self._threads)
        program, self._phases, self._chained = Program(), [], []
        for level in range(self._level + 1):
            rows, chained = [], 0
            for phase in (phase for phase in phases if phase.level == level):
                begin = len(program.numbers)
                for step in phase.steps:
                    step.write(program)
                rows.append((phase.units, phase.ratio, begin, len(program.numbers)))
                chained += phase.chained
            self._phases.append(torch.tensor(rows, dtype=torch.int64).view(-1, 4))
            self._chained.append(chained)
        self._program, self._tensors = program.tensor(), program.constants
        self._arenas: list[Tensor] = []
        del self._steps, self._places, self._moved, self._level

    def start(self) -> Call:
        """A run: its levels are to be called one after the other."""
        return Call(self)


class Call:
    """One run of an engine's programs: memory, and the tensors that go in and come out."""

    def __init__(self, engine: Engine):
        self._engine = engine
        shapes = [engine._shapes[name] for name in engine.outputs]
        self._plain = [_ABSENT] * len(engine.inputs) + [torch.empty(shape) for shape in shapes]

    def __enter__(self) -> Call:
        try:
            self._arena = self._engine._arenas.pop()  # one for each call that is running
        except IndexError:
            self._arena = torch.ops.drive.engine_arena(self._engine._bytes)
        return self

    def __exit__(self, *exception: object) -> None:
        self._engine._arenas.append(self._arena)

    def run(self, level: int, values: dict[str, Tensor]) -> None:
        """Take what there is of the inputs from `values`."""
        engine = self._engine
        for i, name in enumerate(engine.inputs):
            if self._plain[i] is _ABSENT and name in values:
                self._plain[i] = values[name].contiguous()
        torch.ops.drive.engine_run(
            self._plain, engine._program, engine._phases[level], engine._chained[level], engine._tensors,
            self._arena, engine._sums, engine.batch, engine._threads,
        )  # fmt: skip

    @property
    def outputs(self) -> dict[str, Tensor]:
        """By name; each is there as soon as its level has run."""
        return dict(zip(self._engine.outputs, self._plain[len(self._engine.inputs) :], strict=True))
