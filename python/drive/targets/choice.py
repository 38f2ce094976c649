"""Which tensors of a target are pruned: the default, or by predicates and names."""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from drive.layers import Layers, weights_of

from .candidates import ADAPTED, PART, STANDARDISED, Candidate, candidates, matrices
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


class Choice(NamedTuple):
    """What is pruned of a target.

    Attributes:
        tensors: by their first names.
        parameters: entries of all parameters of the model; None: it is none, or some have no size yet.
    """

    tensors: dict[str, Tensor]
    parameters: int | None


def chosen(
    target: Target, include: Include | None, exclude: Include | None, layers: Layers | None, op: str
) -> Choice:
    """The tensors that are pruned; of tied ones, any name will do to choose or to exclude them.

    Raises:
        TypeError: a target, a predicate or names that are none.
        ValueError: a name that fits nothing.
    """
    if not isinstance(target, nn.Module):
        named = list(_named(target, op))
        found = _once(named if include is None else _included(include, named, op))
        return Choice(_without(found, exclude, named, op), None)
    all_ = candidates(target, layers, op=op)
    lazy = any(is_lazy(c.tensor) for c in all_)  # have no size yet
    parameters = None if lazy else sum(c.tensor.numel() for c in all_)
    if include is None:
        found = _default(all_, op)
        if not lazy:
            _warn_of_little(target, found, all_, op)
        named = [] if exclude is None else list(_named(target, op))
        return Choice(_without(found, exclude, named, op), parameters)
    named = list(_named(target, op))
    some = _included(include, named, op) if callable(include) else _by_names(include, named, all_, op)
    found = _without(_once(some), exclude, named, op)
    _check_used(op, found, all_)
    return Choice(found, parameters)


def _check_used(op: str, found: dict[str, Tensor], all_: list[Candidate]) -> None:
    """Raise for what has been asked for in words, but leaves no zeros in the weight that a layer uses."""
    chosen_ids = {id(tensor) for tensor in found.values()}
    for c in all_:
        if id(c.tensor) in chosen_ids and c.reason.startswith((STANDARDISED, PART)):
            raise ValueError(
                f"{op}: {c.name} is {c.reason}: pruning it leaves no zeros in what is used, exclude it"
            )


def _default(all_: list[Candidate], op: str) -> dict[str, Tensor]:
    found = {c.name: c.tensor for c in all_ if not c.reason}
    if not found:
        reasons = Counter(c.reason for c in all_ if c.tensor.dim() > 1)
        why = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
        raise ValueError(
            f"{op}: nothing to prune by default, include says what to: {why or 'there are no matrices'}"
        )
    return found


def _warn_of_little(model: nn.Module, found: dict[str, Tensor], all_: list[Candidate], op: str) -> None:
    share = sum(tensor.numel() for tensor in found.values()) / max(matrices(all_), 1)
    if share < 0.5 and model not in _warned:
        _warned.add(model)
        _log.warning(
            "%s: by default only %.1f %% of the entries of trainable matrices are pruned; drive.coverage "
            "says why, include= and drive.register_layer change it", op, 100 * share,
        )  # fmt: skip


def _included(include: Include, named: list[Named], op: str) -> list[Named]:
    if callable(include):
        return [one for one in named if include(*one)]
    return _fitting("include", include, named, op)


def _without(
    found: dict[str, Tensor], exclude: Include | None, named: list[Named], op: str
) -> dict[str, Tensor]:
    if exclude is None:
        return found
    if callable(exclude):
        excluded = {id(tensor) for name, module, tensor in named if exclude(name, module, tensor)}
    else:
        excluded = {id(tensor) for _, _, tensor in _fitting("exclude", exclude, named, op)}
    return {name: tensor for name, tensor in found.items() if id(tensor) not in excluded}


def _by_names(names: str | Sequence[str], named: list[Named], all_: list[Candidate], op: str) -> list[Named]:
    """What has one of these names; by wildcards only weights, which are not factors of an adapter."""
    exact = {names} if isinstance(names, str) else set(names)
    weights = {id(c.tensor) for c in all_ if c.weight is not None and c.reason != ADAPTED}
    some = _fitting("include", names, named, op)
    few = [one for one in some if one[0] in exact or id(one[2]) in weights]
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
