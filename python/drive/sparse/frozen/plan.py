"""A network as one plan, for inference."""

from __future__ import annotations

import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import guards, store
from .graph import Graph, Input, Ref
from .lower import Runner, lower
from .trace import Untraceable

_PLANS = 8  # of sizes; the one that was not used for longest goes


class OtherInput(ValueError):
    """Arguments that a plan is not for."""


class Frozen:
    """What `drive.sparse.freeze` and `drive.sparse.load` give: call it like the model.

    Its weights are as they were when it was made. Results have no gradients. Every size of the inputs has a
    plan of its own, made at its first call and kept (8 at most); several threads may call at once.
    """

    def __init__(self, graph: Graph, measured: bool = True):
        self._graph, self._measured = graph, measured
        self._runners: OrderedDict[tuple[object, ...], Runner] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> Any:
        """The model's result for these positional arguments.

        Raises:
            ValueError: other arguments than those of the example, but for the sizes that may differ.
        """
        leaves, nesting = pytree.tree_flatten((arguments, {}))
        if nesting != self._graph.arguments:
            raise OtherInput(
                f"freeze: arguments must be as in the example ({len(self._graph.inputs)}), got {len(leaves)}"
            )
        results = self._runner(leaves)(leaves)
        return pytree.tree_unflatten(results, self._graph.result)

    def begin(self, arguments: tuple[Any, ...]) -> None:
        """Make the first plan: what depends on values, not on shapes, shows there.

        Raises:
            Untraceable: something does.
        """
        try:
            self(*arguments)
        except (NotImplementedError, RuntimeError) as error:
            raise Untraceable(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file: the graph as JSON, weights with a mask as their non-zeros; no pickle.

        Raises:
            ValueError: the result or the arguments are of a class that only the model's package knows.
        """
        store.save(self._graph, Path(path))

    @property
    def report(self) -> str:
        """What runs how, for the sizes that were used last."""
        if not self._runners:
            return "not called yet"
        return _report(self._graph, next(reversed(self._runners.values())))

    def __repr__(self) -> str:
        kept = f"{len(self._runners)} plan{'' if len(self._runners) == 1 else 's'}"
        return f"Frozen({len(self._graph.masked)} masked weights, {kept})\n{self.report}"

    def _check(self, leaves: Sequence[Any]) -> None:
        bound: dict[str, int] = {}
        for input, leaf in zip(self._graph.inputs, leaves, strict=True):
            if input.dtype is None:
                same = type(leaf) is type(input.value) and leaf == input.value
                if isinstance(leaf, Tensor) or not same:
                    raise OtherInput(
                        f"freeze: {input.name} must be {input.value!r} as in the example, got {leaf!r}"
                    )
                continue
            _check_tensor(input, leaf)
            for size, got in zip(input.sizes, leaf.shape, strict=True):
                if (size if isinstance(size, int) else bound.setdefault(size, got)) != got:
                    raise _wrong_shape(input, leaf)
                least, most = self._graph.ranges.get(str(size), (0, None))
                if got < least or (most is not None and got > most):
                    raise _wrong_shape(
                        input, leaf, f" of {least} to {'any number' if most is None else most}"
                    )
        sizes = {i.name: tuple(t.shape) for i, t in zip(self._graph.inputs, leaves, strict=True) if i.dtype}
        for guard in self._graph.guards:
            if not guards.holds(guard, sizes):
                raise OtherInput(
                    f"freeze: sizes must be with {guards.plain(guard)} for this plan, got {sizes}"
                )

    def _runner(self, leaves: Sequence[Any]) -> Runner:
        key = (torch.get_num_threads(), *map(_kind, leaves))
        with self._lock:
            if (found := self._runners.get(key)) is None:
                self._check(leaves)
                found = self._runners[key] = lower(self._graph, leaves, self._measured)
                if len(self._runners) > _PLANS:
                    self._runners.popitem(last=False)
            self._runners.move_to_end(key)
            return found


class PartlyFrozen:
    """A model that is not one graph: the model's own code, with plans for those of its parts that are one
    each."""

    def __init__(self, model: nn.Module, why: str, parts: dict[str, Frozen]):
        self._model, self._why, self._parts = model, why, parts

    @torch.no_grad()
    def __call__(self, *arguments: Any) -> Any:
        """The model's result for these positional arguments."""
        return self._model(*arguments)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Not possible.

        Raises:
            ValueError: always: a plan's file holds no code.
        """
        raise ValueError(
            f"freeze: model must be one graph to be saved, got one whose own code runs: {self._why}"
        )

    @property
    def report(self) -> str:
        """What runs how."""
        lines = [f"called as it is: the model's own code ({self._why})"]
        for name, part in self._parts.items():
            lines += [f"{name}:", *("  " + line for line in part.report.splitlines())]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"PartlyFrozen({len(self._parts)} parts)\n{self.report}"


def _kind(leaf: Any) -> object:
    """What a plan depends on."""
    tensor = isinstance(leaf, Tensor)
    return (tuple(leaf.shape), leaf.dtype, leaf.device, leaf.layout) if tensor else (type(leaf), repr(leaf))


def _check_tensor(input: Input, leaf: Any) -> None:
    if not isinstance(leaf, Tensor):
        raise OtherInput(
            f"freeze: {input.name} must be a tensor as in the example, got {type(leaf).__name__}"
        )
    if (dtype := str(leaf.dtype).removeprefix("torch.")) != input.dtype:
        raise OtherInput(f"freeze: {input.name} must be {input.dtype} as in the example, got {dtype}")
    if leaf.device.type != "cpu" or leaf.layout != torch.strided:
        got = f"{leaf.layout} on {leaf.device}"
        raise OtherInput(f"freeze: {input.name} must be a dense tensor on the CPU, got {got}")
    if leaf.dim() != len(input.sizes):
        raise _wrong_shape(input, leaf)


def _wrong_shape(input: Input, leaf: Tensor, rest: str = "") -> OtherInput:
    expected = "x".join(str(s) if isinstance(s, int) else "any" for s in input.sizes) or "no dimension"
    got = "x".join(map(str, leaf.shape))
    return OtherInput(f"freeze: {input.name} must have sizes {expected}{rest}, got {got}")


def _report(graph: Graph, runner: Runner) -> str:
    """How many nodes of each kind are the engine's, how dense its layers are, and what is called as it is."""
    inside = Counter(node.kind for node in runner.nodes if node.name in runner.in_lanes)
    outside = Counter(
        node.options["target"] if node.kind == "call" else node.kind
        for node in runner.nodes
        if node.name not in runner.in_lanes
    )
    engine = ", ".join(f"{count} {kind}" for kind, count in inside.most_common()) or "nothing"
    rest = ", ".join(f"{count} {kind}" for kind, count in outside.most_common()) or "nothing"
    weights = [
        n.options["args"][1] for n in graph if n.options["target"].split(".")[1] in ("conv2d", "linear")
    ]
    dense = [ref.name for ref in weights if isinstance(ref, Ref) and ref.name not in graph.masked]
    unmasked = f"; without a mask: {', '.join(dense[:8])}{' ...' if len(dense) > 8 else ''}" if dense else ""
    return (
        f"{len(graph.masked)} weights with masks{unmasked}\n"
        f"{runner.density:.1%} of the convolutions' multiply-adds are left\n"
        f"in lanes ({runner.levels} program{'' if runner.levels == 1 else 's'}): {engine}\n"
        f"called as they are ({runner.way if runner.way != 'engine' else 'between them'}): {rest}"
    )
