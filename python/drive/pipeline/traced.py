"""The calls that a model's forward pass makes, for what its list of modules does not tell."""

from __future__ import annotations

import logging

from torch import fx, nn

from drive.targets.restore import kept_rng

_log = logging.getLogger(__name__)


class _Tracer(fx.Tracer):
    """Goes into everything but torch.nn's layers and what people derive from its ReLU."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.ReLU) or super().is_leaf_module(m, module_qualified_name)


def traced(model: nn.Module, *, op: str) -> fx.Graph | None:
    """The graph of a model, by torch.fx; None, with a warning to the logger, if it cannot be traced.

    Nothing is computed. Attributes that forward passes set, and the random numbers of the CPU, are afterwards
    as before.

    Args:
        op: whose argument the model is, for the warning.
    """
    attributes = [(module, dict(module.__dict__)) for module in model.modules()]
    try:
        with kept_rng():
            return _Tracer().trace(model)
    except Exception as error:  # whatever a forward pass makes of a stand-in for a tensor
        _log.warning(
            "%s: torch.fx cannot trace %s (%s: %s): ReLUs that it calls as functions would stay as they are, "
            "and layers are taken to be called in the order that their parents list them in",
            op, type(model).__name__, type(error).__name__, str(error).partition("\n")[0],
        )  # fmt: skip
        return None
    finally:
        for module, before in attributes:
            module.__dict__.clear()
            module.__dict__.update(before)


def caller(node: fx.Node) -> str:
    """The name of the module in whose forward pass a node is; empty: the model's own."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(next(reversed(stack.values()))[0]) if stack else ""
