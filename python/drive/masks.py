"""Masks: one bool tensor per prunable tensor, True where the entry survives."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from .bits import read_packed, write_packed, write_sharded
from .distributed.placement import check_placed, distributed_like, is_dtensor, local, sharded_like
from .holding.attachment import Attachment, innermost
from .holding.hold import OnRevived
from .holding.zero import zero_pruned_
from .layers import Layers
from .targets.choice import Include, Target
from .targets.multiply_adds import MULTIPLY_ADDS, dense_work, multiply_adds_on, work
from .targets.targets import check_data, check_dtype, prunable
from .targets.wrappers import look_up, owners, unwrap


class Masks(Mapping[str, Tensor]):
    """Names of parameters to their masks (bool, the parameter's shape; False: pruned).

    The mask of a DTensor is a DTensor, placed like it; what counts or saves such masks (`sparsity`,
    `summary`, `save`) must be called by all ranks together.

    The tensors are shared, not copied: a further pruning step updates them in place, and whatever
    holds these masks (see `attach`) follows.

    Attributes:
        parameters: entries of all parameters of the model that they are of, those without a mask included;
            None: not known.
    """

    def __init__(self, masks: Mapping[str, Tensor], parameters: int | None = None):
        if not isinstance(masks, Mapping):
            raise TypeError(f"Masks: masks must be a mapping of names to tensors, got {type(masks).__name__}")
        for name, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"Masks: {name} must be a bool tensor, got {got}")
        self._masks, self.parameters = dict(masks), parameters

    @classmethod
    def of(cls, masks: Mapping[str, Tensor]) -> Masks:
        """These masks, or masks that share the tensors of a mapping.

        Raises:
            TypeError: neither.
        """
        return masks if isinstance(masks, Masks) else cls(masks)

    @classmethod
    def dense(
        cls,
        target: Target,
        include: Include | None = None,
        exclude: Include | None = None,
        layers: Layers | None = None,
    ) -> Self:
        """Masks of the prunable tensors in which nothing is pruned: to load a checkpoint into, say.

        Args:
            target, include, exclude, layers: as in `fused_drive_prune`.
        """
        weights = prunable(target, include, exclude, layers, op="Masks.dense")
        return cls.ones(weights, weights.parameters)

    @classmethod
    def ones(cls, weights: Mapping[str, Tensor], parameters: int | None = None) -> Self:
        """The same of these tensors."""
        with torch.inference_mode(False):  # to be written to outside of it, too
            ones = {name: torch.ones_like(local(w), dtype=torch.bool) for name, w in weights.items()}
        return cls({n: distributed_like(ones[n], w) for n, w in weights.items()}, parameters)

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        if any(map(is_dtensor, self.values())):  # to count, all ranks would have to be asked
            return f"Masks({len(self)} tensors, sharded)"
        return f"Masks({len(self)} tensors, sparsity {self.sparsity():.4f})"

    def sparsity(self) -> float:
        """Fraction of False over all entries (0.0 if there are none)."""
        total = sum(mask.numel() for mask in self.values())
        return 1 - sum(self._kept().values()) / total if total else 0.0

    def summary(
        self, model: nn.Module | None = None, inputs: Any = None, layers: Layers | None = None
    ) -> str:
        """A table as text: tensor, shape, entries kept, density; sparsity of these, and of all parameters.

        With a model and inputs, also the multiply-adds that are left of each tensor's, for one sample.

        Args:
            model: whose parameters the masks name. One forward pass is made through it in eval mode, after
                which it is as before, and so is the RNG.
            inputs: one batch of the model's: its only argument, a tuple of the positional ones, or a mapping
                of the named ones. On the model's device.
            layers: of `drive.prune`.

        Raises:
            ValueError: one of model and inputs is missing; as `apply_`.
            TypeError: as `apply_`.
        """
        op = "Masks.summary"
        if (model is None) != (inputs is None):
            missing = "no model" if model is None else "no inputs"
            raise ValueError(f"{op}: model and inputs must be given together, got {missing}")
        if model is None:
            return self._table()
        weights = dict(zip(self, (weight for weight, _ in self._pairs(model, op)), strict=True))
        return self._table(multiply_adds_on(model, weights, inputs, layers, op=op))

    def _table(self, costs: Mapping[str, int] | None = None, unit: str = MULTIPLY_ADDS) -> str:
        """Of `summary`, with what the survivors cost.

        Args:
            costs: of an entry of each tensor.
            unit: of the costs.
        """
        kept = self._kept()
        width = max((len(name) for name in self), default=0)
        lines = [
            f"{name:<{width}}  {'x'.join(map(str, mask.shape)):>16}  {kept[name]:>12,}  "
            f"{kept[name] / max(mask.numel(), 1):8.4f}"
            + ("" if costs is None else f"  {costs[name] * kept[name]:>18,}")
            for name, mask in self.items()
        ]
        header = f"{'tensor':<{width}}  {'shape':>16}  {'kept':>12}  {'density':>8}"
        if costs is not None:
            header += f"  {unit:>18}"
        total = sum(mask.numel() for mask in self.values())
        pruned = total - sum(kept.values())
        last = f"sparsity {pruned / max(total, 1):.6f} of {total:,} entries"
        if self.parameters:
            last += (
                f", {total / self.parameters:.2%} of all {self.parameters:,} parameters: "
                f"{pruned / self.parameters:.2%} of these are pruned"
            )
        if costs is not None:
            left, dense = work(costs, kept), dense_work(costs, self)
            last += f"\n{unit} left {left:,} of {dense:,}: {left / max(dense, 1):.2%}"
        return "\n".join([header, *lines, last])

    @torch.no_grad()
    def apply_(self, model: nn.Module | Mapping[str, Tensor]) -> Self:
        """Set every pruned weight of the model to exactly 0, in place.

        Args:
            model: whose parameters the masks name, whatever wraps it or parts of it; an average of its
                weights, say. Or tensors by name, as in a state_dict, of whose keys what wrappers add to them
                ("module.", "_orig_mod.") is ignored if the names are not there as they are.

        Raises:
            ValueError: a name is missing or stands for several tensors, a shape differs, a weight has no
                data; nothing is changed then.
            TypeError: a weight is of a dtype or kind that cannot be pruned; likewise.
        """
        zero_pruned_(self._pairs(model, "Masks.apply_"))
        return self

    def attach(
        self, model: nn.Module, optimizer: Optimizer | None = None, *, on_revived: OnRevived = "zero"
    ) -> Attachment:
        """Keep pruned weights at exactly 0 while the model trains, however it is trained.

        Gradients of pruned weights become 0 as soon as they are accumulated (so norms and clipping see the
        sparse model), and after every optimizer step the pruned entries of the weights and of what is known
        to be entry-wise in the optimizer's state (momentum, Adam's moments, whatever existed before;
        `drive.register_optimizer`) are set to 0. What something else writes into pruned weights (an optimizer
        over float32 copies of them, an average of weights from before) is found before the next forward pass.

        It belongs to the model's modules: it ends with them, copies and pickles of them are held, too, and so
        is what `load_state_dict` loads. docs/training.md has the table of loops, wrappers and optimizers.
        Masks that are attached later are held beside those of before.

        Args:
            model: the model whose parameters these masks name.
            optimizer: one that exists already, to zero its state now; its steps are seen in any case.
            on_revived: what to do before a forward pass when pruned weights are not zero: "zero" them, with a
                warning to the logger, or raise an "error".

        Returns:
            A handle: `handle.remove()`, or use it as a context manager. It need not be kept.

        Raises:
            ValueError: a name is missing in the model, or a shape differs; `on_revived` is neither.
            TypeError: the model is no module, or the optimizer none.
            RuntimeError: later, in a step: a weight has been replaced by one that its mask does not fit;
                before a forward pass: pruned weights are not zero, and `on_revived` is "error".
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"Masks.attach: model must be a module, got {type(model).__name__}")
        if on_revived not in ("zero", "error"):
            raise ValueError(f"Masks.attach: on_revived must be 'zero' or 'error', got {on_revived!r}")
        if optimizer is not None:
            innermost(optimizer)
        pairs = self._pairs(model, "Masks.attach")
        places: dict[int, list[tuple[nn.Module, str]]] = {}  # of a tied weight there are several
        for module, key in dict.fromkeys(owners(model, op="Masks.attach").values()):
            places.setdefault(id(module._parameters[key]), []).append((module, key))
        owned = [
            (module, key, name, mask)
            for name, (weight, mask) in zip(self, pairs, strict=True)
            for module, key in places[id(weight)]
        ]
        attachment = Attachment(unwrap(model), owned, on_revived)
        if optimizer is not None:
            attachment.clear(optimizer)
        return attachment

    def state_dict(self) -> dict[str, Tensor]:
        """The mask tensors by name (shared, not copied)."""
        return dict(self._masks)

    def check_match(self, op: str, weights: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless these are masks of exactly those tensors: names, shapes, device."""
        _check_same_names(op, weights, self)
        for name, weight in weights.items():
            _check_shape(op, f"masks[{name}]", self[name], weight)
            check_placed(op, f"masks[{name}]", self[name], weight)
            if self[name].device != weight.device:
                raise ValueError(f"{op}: masks[{name}] must be on {weight.device}, got {self[name].device}")

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy masks of the same names and shapes into these, in place: whole ones into DTensors, too.

        Raises:
            ValueError: names or shapes differ; nothing is changed then.
        """
        _check_same_names("Masks.load_state_dict", self, state)
        for name, mask in self.items():
            _check_shape("Masks.load_state_dict", name, state[name], mask)
        for name, mask in self.items():
            local(mask).copy_(local(sharded_like(state[name], mask)))

    def save(self, path: str | os.PathLike[str], process_group: dist.ProcessGroup | None = None) -> None:
        """Write a safetensors file with one bit an entry; a crash leaves the old file or the new one.

        Of DTensors, rank 0 writes it, piece by piece, while the others send their bits. `process_group` is as
        in `fused_drive_prune`.
        """
        if any(map(is_dtensor, self.values())):
            write_sharded(Path(path), self._masks, self.parameters, process_group)
        else:
            write_packed(Path(path), self._masks, self.parameters)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is truncated, corrupt, or not a masks file (nor a file: a folder, a FIFO).
        """
        masks, parameters = read_packed(path)
        return cls({name: mask.to(device) for name, mask in masks.items()}, parameters)

    def to(self, device: torch.device | str) -> Masks:
        """The same masks on another device (tensors already there are shared)."""
        return Masks({name: mask.to(device) for name, mask in self.items()}, self.parameters)

    def clone(self) -> Masks:
        """Copies of the masks."""
        with torch.inference_mode(False):
            return Masks({name: mask.clone() for name, mask in self.items()}, self.parameters)

    def apart_(self) -> Self:
        """Each mask in memory of its own, where several share a piece: `torch.save` of one writes that one.

        The tensors are the same objects as before, so that whatever holds them follows.
        """
        for mask in self.values():
            here = local(mask)
            if here.untyped_storage().nbytes() > here.numel():
                if here.is_cuda:
                    here.record_stream(torch.cuda.current_stream(here.device))  # it may be of another one
                here.data = here.clone()
        return self

    def _kept(self) -> dict[str, int]:
        kept = {name: mask.sum() for name, mask in self.items()}
        return {name: int(k.full_tensor() if is_dtensor(k) else k) for name, k in kept.items()}

    def _pairs(self, model: nn.Module | Mapping[str, Tensor], op: str) -> list[tuple[Tensor, Tensor]]:
        """(weight, mask) of every mask, checked."""
        weights = look_up(op, model, self)
        for name, mask in self.items():
            check_data(op, name, weights[name], model)
            check_dtype(op, name, weights[name])
            _check_shape(op, name, mask, weights[name])
            check_placed(op, name, mask, weights[name])
        return [(weights[name], mask) for name, mask in self.items()]


def _check_same_names(op: str, expected: Mapping[str, Any], got: Mapping[str, Any]) -> None:
    missing, unknown = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
    if missing or unknown:
        what = f"no mask for {missing[0]}" if missing else f"a mask for {unknown[0]}, which is not pruned"
        raise ValueError(f"{op}: masks must be those of this model: there is {what}")


def _check_shape(op: str, name: str, got: Tensor, expected: Tensor) -> None:
    if got.shape != expected.shape:
        raise ValueError(f"{op}: {name} must have shape {tuple(expected.shape)}, got {tuple(got.shape)}")
