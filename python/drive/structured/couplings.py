"""The groups of a model: channels by torch-pruning's graph of one pass, heads by what attentions have."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from drive.layers import Layers, Weight, weights_of
from drive.targets.multiply_adds import tensors_in
from drive.targets.restore import scoring, seeded

from .check import set_training
from .cut import named_tensors
from .groups import Couplings, Group, Slices
from .heads import Attention, Projection, attentions

OUTPUTS = "outputs of the network"
_PER_CHANNEL = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU)


def couplings(
    model: nn.Module,
    weights: Collection[str],
    run: Callable[[], Any],
    layers: Layers | None = None,
    *,
    training: bool | None = None,
    op: str,
) -> Couplings:
    """Groups of units that can be removed: all that makes them are rows of `weights`.

    Units that a norm over channels, an embedding, a weight that is not among these or the network's outputs
    have a part in stay whole.

    Args:
        model: not wrapped. It, and the RNG, are afterwards as before.
        weights: the names of those that may lose rows.
        run: a pass through the model, with gradients: tensors, of which all are outputs.
        layers: of `drive.prune`.
        training: in that mode (but for norms, which need several samples for it): what runs in the other one
            only is not seen. None: in the model's own.
        op: for the error messages.

    Raises:
        ImportError: torch-pruning is not installed.
        ValueError: the graph cannot be made.
    """
    torch_pruning = _torch_pruning(op)
    names = _Names(model, layers)
    heads = list(attentions(model, layers))
    every = list(model.parameters())
    floats = {str(i): p for i, p in enumerate(every) if p.is_floating_point()}  # frozen ones have no node
    passed, now = list[Tensor](), model.training

    def forward(*_: object) -> Tensor:
        set_training(model, now if training is None else training)
        passed.append(_summed(run()))
        return passed[0]

    with (
        scoring(model, floats),
        seeded(0),
        torch.enable_grad(),
        _in_one_piece(module for _, module, _ in heads),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            graph = torch_pruning.DependencyGraph().build_dependency(
                model.eval(),
                (),
                forward_fn=forward,
                customized_pruners=_pruners(torch_pruning, model, heads, layers),
                verbose=False,
            )
            kinds = tuple({type(module) for module in model.modules() if weights_of(module, layers)})
            found = [
                _read(torch_pruning, graph, members, names, set(weights))
                for members in graph.get_all_groups(root_module_types=kinds)
            ]
        except Exception as error:  # a library's guesses about somebody's model
            if not passed:  # the model's own
                raise
            raise ValueError(
                f"{op}: what couples this model's channels cannot be found ({type(error).__name__}: {error})"
            ) from error
    found += [_of_heads(name, attention, names, set(weights)) for name, _, attention in heads]
    order = {name: number for number, name in enumerate(names.tensors)}
    groups = sorted(
        (group for group in found if isinstance(group, Group)), key=lambda group: order[group.rows[0].tensor]
    )
    whole = {layer: reason for some in found if not isinstance(some, Group) for layer, reason in some.items()}
    return Couplings(tuple(groups), whole)


@contextmanager
def _in_one_piece(attentions: Iterable[nn.Module]) -> Iterator[None]:
    """For autograd, what each of these computes is one operation on its inputs; no backward pass may come."""

    def hide(module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> Any:
        inputs = [tensor for tensor in tensors_in((args, kwargs)) if tensor.requires_grad]

        def hidden(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                return _Through.apply(leaf.detach(), *inputs)
            return leaf

        return tree_map(hidden, outputs)

    handles = [module.register_forward_hook(hide, with_kwargs=True) for module in attentions]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Through(torch.autograd.Function):
    """Its first argument, as if computed from the others."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *inputs: Tensor) -> Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("nothing is differentiated here")


def _torch_pruning(op: str) -> ModuleType:
    try:
        return import_module("torch_pruning")
    except ImportError as error:
        raise ImportError(
            f"{op}: channels need the package torch-pruning: pip install 'drive-prune[structured]'"
        ) from error


class _Names:
    """Names of a model's tensors, by what torch-pruning's graph has."""

    def __init__(self, model: nn.Module, layers: Layers | None):
        self.layers = layers
        self.modules = {module: name for name, module in model.named_modules()}
        self.tensors: dict[str, Tensor] = {}
        self._by_id: dict[int, str] = {}
        for name, tensor in named_tensors(model).items():
            if self._by_id.setdefault(id(tensor), name) == name:
                self.tensors[name] = tensor

    def of(self, tensor: Tensor | None) -> str:
        """The first of its names."""
        return self._by_id[id(tensor)]


_Whole = dict[str, str]  # layer -> reason


def _read(
    torch_pruning: ModuleType, graph: Any, members: Any, names: _Names, weights: set[str]
) -> Group | _Whole:
    """One of torch-pruning's groups: where its units are, or why they stay."""
    rows: list[Slices] = []
    vectors: list[Slices] = []
    columns: list[Slices] = []
    layers: list[str] = []
    reason = ""
    root = members[0].dep.target.module
    units = len(members[0].idxs)
    for member in members:
        module, out = member.dep.target.module, graph.is_out_channel_pruning_fn(member.dep.handler)
        kind = type(module).__name__
        if isinstance(module, nn.Parameter):
            name = names.of(module)
            if sum(size > 1 for size in module.shape) > 1:
                reason = reason or f"{name} has a part in it"
                continue
            places = [(vectors, name, member.dep.target.pruning_dim)]
        elif module not in names.modules:  # an operation
            if isinstance(module, torch_pruning.ops._OutputOp):
                reason = OUTPUTS
            continue
        elif isinstance(module, _PER_CHANNEL):
            tensors = [*module._parameters.values(), *module._buffers.values()]
            some = [tensor for tensor in tensors if tensor is not None and tensor.dim() == 1]
            places = [(vectors, names.of(tensor), 0) for tensor in some if len(tensor) > 1]
        elif (weight := weights_of(module, names.layers).get("weight")) is not None:
            name = names.of(module.weight)
            groups = getattr(module, "groups", 1)
            if out:
                layers.append(names.modules[module])
            if groups > 1 and not groups == module.in_channels == module.out_channels:
                reason = reason or "a convolution in groups"
                continue
            if not out:
                places = [(columns, name, weight.inputs)]
            else:
                if name not in weights:
                    reason = reason or "weights that are not to be pruned"
                places = [(rows, name, weight.outputs)]
                if (bias := module._parameters.get("bias")) is not None:
                    places.append((vectors, names.of(bias), 0))
        else:
            reason = reason or f"{kind} over the channels"
            continue
        indices = _aligned(member, units)
        if indices is None:
            reason = reason or f"channels that {kind} has several parts of"
            continue
        for kept, name, axis in places:
            kept.append(Slices(name, axis, indices))
    name = names.modules[root]
    if reason:
        return dict.fromkeys(layers or [name], reason)
    position = {tensor: number for number, tensor in enumerate(names.tensors)}
    rows.sort(key=lambda place: position[place.tensor])
    return Group(rows[0].tensor.rpartition(".")[0], units, tuple(rows), tuple(vectors), tuple(columns))


def _aligned(member: Any, units: int) -> Tensor | None:
    """[units, n] indices of a member, by the unit of the root that they are of."""
    if len(member.idxs) % units or None in member.root_idxs:
        return None
    each = len(member.idxs) // units
    roots, indices = torch.tensor(member.root_idxs), torch.tensor(member.idxs)
    order = roots.argsort(stable=True)
    if not torch.equal(roots[order], torch.arange(units).repeat_interleave(each)):
        return None
    return indices[order].view(units, each)


def _of_heads(name: str, attention: Attention, names: _Names, weights: set[str]) -> Group | _Whole:
    def places(some: list[Projection]) -> tuple[Slices, ...]:
        return tuple(Slices(names.of(p.module._parameters[p.key]), p.axis, p.indices) for p in some)

    rows = places(attention.rows)
    if any(place.tensor not in weights for place in rows):
        return {name: "weights that are not to be pruned"}
    return Group(name, attention.heads, rows, places(attention.vectors), places(attention.columns))


def _summed(outputs: Any) -> Tensor:
    """One number that depends on all outputs, so that these are no layer's any more."""
    return torch.stack([output.double().sum() for output in outputs if output.requires_grad]).sum()


def _pruners(
    torch_pruning: ModuleType,
    model: nn.Module,
    heads: list[tuple[str, nn.Module, Attention]],
    layers: Layers | None,
) -> dict[type[nn.Module], Any]:
    """For the graph: attentions are of one piece, and layers that only the registry knows multiply.

    It asks for numbers of channels, and compares functions; nothing is removed by them.
    """
    base = torch_pruning.BasePruningFunc

    class Opaque(base):  # type: ignore[misc, valid-type]
        def prune_out_channels(self, layer: nn.Module, idxs: Any) -> None: ...

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: nn.Module) -> None: ...

        get_in_channels = get_out_channels

    class Matrix(base):  # type: ignore[misc, valid-type]
        def prune_out_channels(self, layer: nn.Module, idxs: Any) -> None: ...

        def prune_in_channels(self, layer: nn.Module, idxs: Any) -> None: ...

        def get_out_channels(self, layer: Any) -> int:
            size: int = layer.weight.shape[_axes(layer, layers).outputs]
            return size

        def get_in_channels(self, layer: Any) -> int:
            size: int = layer.weight.shape[_axes(layer, layers).inputs]
            return size

    native = nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention, nn.LSTM
    matrices = {
        type(module)
        for module in model.modules()
        if not isinstance(module, native) and "weight" in weights_of(module, layers)
    }
    found: dict[type[nn.Module], Any] = {kind: Matrix() for kind in matrices}
    return found | {
        type(module): Opaque() for _, module, _ in heads if not isinstance(module, nn.MultiheadAttention)
    }


def _axes(layer: nn.Module, layers: Layers | None) -> Weight:
    return weights_of(layer, layers)["weight"]
