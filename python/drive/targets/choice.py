"""Which tensors of a target are pruned: the default, or by predicates and names."""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from drive.layers import Layers, weights_of

from .candidates import ADAPTED, Candidate, candidates, matrices
from .wrappers import owners

_log = logging.getLogger(__name__)
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()

Target = nn.Module | Mapping[str, Tensor] | Sequence[Tensor]
Predicate = Callable[[str, nn.Module | None, Tensor], bool]  # name, its module, the tensor
Include = Predicate | str | Sequence[str]  # or names, with wildcards
Named = tuple[str, nn.Module | None, Tensor]


def default_include(name: str, module: nn.Module | None, tensor: Tensor) -> bool:
    """Is it a trainable weight of a layer type that is known (`drive.register_layer`)?

    For predicates of one's own, which see a parameter alone: that it is tied to an embedding, or a factor of
    an adapter, only the whole model tells. `include=None` knows, and `exclude` removes from that.
    """
    key = name.rpartition(".")[2]
    return module is not None and tensor.requires_grad and key in weights_of(module)


def chosen(
    target: Target, include: Include | None, exclude: Include | None, layers: Layers | None, op: str
) -> dict[str, Tensor]:
    """The tensors by their first names; of tied ones, any name will do to choose or to exclude them.

    Raises:
        TypeError: a target, a predicate or names that are none.
        ValueError: a name that fits nothing.
    """
    model = target if isinstance(target, nn.Module) else None
    named = [] if model is not None and include is None and exclude is None else list(_named(target, op))
    if model is not None and include is None:
        found = _default(model, candidates(model, layers, op=op), op)
    elif include is None:
        found = _once(named)
    elif callable(include):
        found = _once([one for one in named if include(*one)])
    else:
        found = _once(_by_names(include, named, model, layers, op))
    if exclude is None:
        return found
    without = _excluded(exclude, named, op)
    return {name: tensor for name, tensor in found.items() if id(tensor) not in without}


def _default(model: nn.Module, all_: list[Candidate], op: str) -> dict[str, Tensor]:
    found = {c.name: c.tensor for c in all_ if not c.reason}
    if not found:
        reasons = Counter(c.reason for c in all_ if c.tensor.dim() > 1)
        why = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
        raise ValueError(
            f"{op}: nothing to prune by default, include says what to: {why or 'there are no matrices'}"
        )
    if any(map(is_lazy, found.values())):  # have no size yet
        return found
    share = sum(tensor.numel() for tensor in found.values()) / max(matrices(all_), 1)
    if share < 0.5 and model not in _warned:
        _warned.add(model)
        _log.warning(
            "%s: by default only %.1f %% of the entries of trainable matrices are pruned; drive.coverage "
            "says why, include= and drive.register_layer change it", op, 100 * share,
        )  # fmt: skip
    return found


def _excluded(exclude: Include, named: list[Named], op: str) -> set[int]:
    if callable(exclude):
        return {id(tensor) for name, module, tensor in named if exclude(name, module, tensor)}
    return {id(tensor) for _, _, tensor in _fitting("exclude", exclude, named, op)}


def _by_names(
    names: str | Sequence[str], named: list[Named], model: nn.Module | None, layers: Layers | None, op: str
) -> list[Named]:
    """What has one of these names; by wildcards only weights, which are not factors of an adapter."""
    fitting = _fitting("include", names, named, op)
    if model is None:
        return fitting
    exact = {names} if isinstance(names, str) else set(names)
    found = candidates(model, layers, op=op)
    weights = {id(c.tensor) for c in found if c.weight is not None and c.reason != ADAPTED}
    few = [one for one in fitting if one[0] in exact or id(one[2]) in weights]
    if not few:
        raise ValueError(f"{op}: include must name weights, got {names!r}: others are named in full")
    return few


def _fitting(argument: str, names: str | Sequence[str], named: list[Named], op: str) -> list[Named]:
    patterns = [names] if isinstance(names, str) else list(names)
    if wrong := [pattern for pattern in patterns if not isinstance(pattern, str)]:
        raise TypeError(f"{op}: {argument} must be a predicate or names, got {wrong[0]!r}")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name, _, _ in named):
            raise ValueError(f"{op}: {argument} must name parameters, got {pattern!r}, which fits none")
    return [one for one in named if any(fnmatchcase(one[0], pattern) for pattern in patterns)]


def _once(named: list[Named]) -> dict[str, Tensor]:
    """Tied tensors under the first of their names."""
    first: dict[int, tuple[str, Tensor]] = {}
    for name, _, tensor in named:
        first.setdefault(id(tensor), (name, tensor))
    return dict(first.values())


def _named(target: Target, op: str) -> Iterator[Named]:
    if isinstance(target, nn.Module):
        for name, (module, key) in owners(target, op=op).items():
            parameter = module._parameters[key]  # get_parameter would take as long as `owners`
            assert parameter is not None
            yield name, module, parameter
    elif isinstance(target, Mapping):
        for name, tensor in target.items():
            yield str(name), None, tensor
    elif isinstance(target, Sequence) and not isinstance(target, str):
        for index, tensor in enumerate(target):
            yield str(index), None, tensor
    else:
        raise TypeError(
            f"{op}: target must be a module, a mapping or a sequence of tensors, got {type(target).__name__}"
        )
