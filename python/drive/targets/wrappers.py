"""Names of parameters: those of the innermost model, whatever wraps it, or parts of it."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from drive.distributed.placement import reshard
from drive.distributed.wrappers import CHILDREN, chain, is_a, wrapped

# What wrappers add to the keys of a state_dict: anywhere, and in front
_PRIVATE = {name for name in CHILDREN if name.startswith("_")}
_IN_FRONT = "module.", "base_model.model."
_PUBLIC = CHILDREN - _PRIVATE - {"module", "base_model", "model"}


def unwrap(model: nn.Module) -> nn.Module:
    """The innermost model: what torch.compile, DistributedDataParallel and other wrappers wrap."""
    *_, inner = chain(model)
    return inner


def uncompiled() -> AbstractContextManager[object]:
    """Inside, compiled parts run as the code that they are of: for one pass of a copy, or with hooks in them.

    Without importing what compiles, which takes seconds, where nobody has.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As the model's own, each module once, by the names that it has without wrappers.

    A wrapper has the name of what it wraps, and comes before it.
    """
    seen: set[nn.Module] = set()
    for name, module in _walk(model, ""):
        if module not in seen:
            seen.add(module)
            yield name, module


def owners(model: nn.Module, *, op: str = "owners") -> dict[str, tuple[nn.Module, str]]:
    """Every parameter's module and its key in `module._parameters`, by its name without wrappers.

    Tied parameters are there under each of their names. FSDP2's are the shards afterwards.

    Args:
        op: whose argument the model is, for the error messages.

    Raises:
        TypeError: FSDP1 shards the model.
        ValueError: two parameters would have one name.
    """
    found: dict[str, tuple[nn.Module, str]] = {}
    logits = [module for module in chain(model) if is_a(module, "drive", "LearnedMask")]  # not of the model
    for prefix, module in _walk(reshard(model), ""):
        if logits and module in logits:
            continue
        if is_a(module, "torch", "FullyShardedDataParallel"):
            raise TypeError(
                f"{op}: model must be sharded by torch.distributed.fsdp.fully_shard (FSDP2), got "
                "FullyShardedDataParallel (FSDP1): each rank would prune its own flat piece"
            )
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = _joined(prefix, key)
            owner, there = found.setdefault(name, (module, key))
            if owner._parameters[there] is not parameter:
                raise ValueError(
                    f"{op}: parameters must have different names without wrappers, got two called {name}: "
                    "adapters of one name around one another?"
                )
    return found


def look_up(op: str, target: nn.Module | Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """The tensors of these names, in their order.

    In a module, by names without wrappers, or with all of them, or those of some inner one (files that were
    written so). In a mapping, by its keys as they are, or without what wrappers add to them.

    Raises:
        TypeError: as `owners`.
        ValueError: as `owners`; a name is missing, or stands for several tensors.
    """
    namings = _of_module(target, op) if isinstance(target, nn.Module) else _of_mapping(target)
    there = min(namings, key=lambda naming: sum(name not in naming for name in names))
    for name in names:
        if name not in there:
            raise ValueError(f"{op}: the model has no parameter {name}: masks of another model?")
        if len(there[name]) > 1:
            raise ValueError(
                f"{op}: {name} must stand for one tensor, got {len(there[name])} whose keys differ in what "
                "wrappers add to them"
            )
    return {name: there[name][0] for name in names}


_Naming = Mapping[str, list[Tensor]]  # different tensors of a name; there should be one


def _of_module(model: nn.Module, op: str) -> Iterator[_Naming]:
    yield _naming((name, module._parameters[key]) for name, (module, key) in owners(model, op=op).items())
    for inner in chain(model):
        yield _naming(inner.named_parameters(remove_duplicate=False))


def _of_mapping(tensors: Mapping[str, Tensor]) -> Iterator[_Naming]:
    for keys in _peeled([str(key) for key in tensors]):
        yield _naming(zip(keys, tensors.values(), strict=True))


def _peeled(keys: list[str]) -> Iterator[list[str]]:
    """Keys as they are, and with less and less of what wrappers add.

    Not all at once, for a model that has a part called `module` or `base_layer` itself.
    """
    yield keys
    keys = _without(_PRIVATE, keys)
    yield keys
    yield _without(_PUBLIC, keys)
    while any(key.startswith(_IN_FRONT) for key in keys):
        keys = [key.removeprefix(next(filter(key.startswith, _IN_FRONT), "")) for key in keys]
        yield keys
        yield _without(_PUBLIC, keys)


def _without(parts: Collection[str], keys: list[str]) -> list[str]:
    return [".".join(part for part in key.split(".") if part not in parts) for key in keys]


def _naming(named: Iterable[tuple[str, Tensor | None]]) -> _Naming:
    found: dict[str, list[Tensor]] = {}
    for name, tensor in named:
        if tensor is not None and all(tensor is not other for other in found.setdefault(name, [])):
            found[name].append(tensor)
    return found


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Every module under each of its names."""
    yield prefix, module
    inner = wrapped(module)
    for key, child in module._modules.items():
        if child is not None:
            yield from _walk(child, prefix if key in inner else _joined(prefix, key))


def _joined(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key
