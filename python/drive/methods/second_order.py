"""Hessian times gradient, by differentiating twice: nothing larger than the graph of one batch."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from drive._scoring.gradients import checked
from drive._scoring.loss import Batch, tensors_in
from drive.targets.outputs import Rows
from drive.targets.restore import scoring
from drive.targets.wrappers import named_modules, uncompiled

from .base import Problem


def hessian_times_gradient(
    op: str, problem: Problem, batches: Sequence[Batch], temperature: float = 1.0
) -> dict[str, Tensor]:
    """H g on the prunable weights: g is dL/dtheta summed over the batches, H the Hessian of that sum.

    H g = d<g, dL/dtheta>/dtheta with g held fixed, added up batch by batch, so that a large batch can come in
    pieces. Entries pruned before take no part in the product.

    Args:
        op: whose product it is, for the error messages.
        temperature: the model's outputs are divided by it before the loss.

    Raises:
        ValueError: a prunable weight has no part in the loss; an operation of the model has no second
            derivative.
    """
    _, product = _products(op, problem, batches, temperature)
    return dict(zip(problem.weights, product, strict=True))


def gate_sensitivities(
    op: str, problem: Problem, outputs: Mapping[str, Rows], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """d<g, dL/dtheta>/dc of gates c = 1 on the outputs of each prunable weight, after its bias: [outputs].

    g is dL/dtheta of the prunable weights summed over the batches, held fixed. A gate multiplies its row of
    the weight, and its bias b, so that it is the sum over the row of g dL/dtheta + theta H g, and b d<g,
    dL/dtheta>/db. In float64.

    Raises:
        ValueError: as `hessian_times_gradient`.
    """
    biases = {name: row.bias for name, row in outputs.items() if row.bias is not None}
    with scoring(problem.model, biases):  # frozen ones are multiplied, too
        gradient, product = _products(op, problem, batches, 1.0, list(biases.values()))
    of_biases = dict(zip(biases, product[len(outputs) :], strict=True))
    found = {}
    for (name, row), g, hg in zip(outputs.items(), gradient, product, strict=False):
        weight = problem.weights[name].detach().double()
        entries = g.double().square() + weight * hg.double()
        found[name] = entries.movedim(row.axis, 0).flatten(1).sum(1)
        if row.bias is not None:
            found[name] += row.bias.detach().double() * of_biases[name].double()
    return found


def _products(
    op: str, problem: Problem, batches: Sequence[Batch], temperature: float, beside: Sequence[Tensor] = ()
) -> tuple[list[Tensor], list[Tensor]]:
    """g, and the derivatives of <g, dL/dtheta> by the weights and by what is given beside them."""
    try:
        return _twice(problem, batches, temperature, beside)
    except RuntimeError as error:
        if not (missing := _NO_SECOND.search(str(error))):
            raise
        operation = next(filter(None, missing.groups()), None)
        layer = _layer_with(operation, problem, batches[0], temperature)
        where = f" in {layer}" if layer else ""
        raise ValueError(
            f"{op}: the model must have a second derivative, got {operation or 'an operation'} without one"
            f"{where} ({error}): replace it, or take a method of first order (drive, snip)"
        ) from error


# what PyTorch and torchvision say of an operation that can be differentiated once only
_NO_SECOND = re.compile(
    r"derivative for (?:aten::|')_?(\w+)_backward'? is not implemented"
    r"|double backwards? (?:on (\w+) not|is not) supported"
    r"|marked with @once_differentiable",
    re.IGNORECASE,
)


def _layer_with(operation: str | None, problem: Problem, batch: Batch, temperature: float) -> str | None:
    """The name of the innermost module that computes this, found in the graph of another forward pass.

    Args:
        operation: None: a function of Python's that is marked with @once_differentiable.
    """
    found: list[str] = []
    seen: set[object] = set()  # nodes of modules that are done: what is new is of the one that ends

    def computes(node: Any) -> bool:
        if operation is None:  # the mark is a wrapper around `backward`
            function = getattr(node, "_forward_cls", None)
            return hasattr(getattr(function, "backward", None), "__wrapped__")
        return operation.replace("_", "").lower() in node.name().replace("_", "").lower()

    def leave(name: str, outputs: Any) -> None:
        if any(map(computes, _graph(tensors_in(outputs), seen))):
            found.append(name)

    handles = [
        module.register_forward_hook(lambda module, args, outputs, name=name: leave(name, outputs))
        for name, module in named_modules(problem.model)
        if name
    ]
    try:
        with torch.enable_grad(), uncompiled():
            problem.loss(problem.model, batch, temperature)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _graph(tensors: Sequence[Tensor], seen: set[object]) -> Iterator[Any]:
    """The nodes that autograd has for these, without those seen before, to which they are added."""
    nodes: list[Any] = [tensor.grad_fn for tensor in tensors]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
            yield node


def _twice(
    problem: Problem, batches: Sequence[Batch], temperature: float, beside: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    weights = list(problem.weights.values())

    def gradients(batch: Batch, create_graph: bool) -> list[Tensor]:
        loss = problem.loss(problem.model, batch, temperature)
        grads = torch.autograd.grad(loss, weights, create_graph=create_graph, allow_unused=True)
        return list(checked(problem.weights, grads).values())

    def masked(grads: Sequence[Tensor]) -> list[Tensor]:
        masks: Mapping[str, Tensor] = problem.masks or {}
        named = zip(problem.weights, grads, strict=True)
        return [grad * masks[name] if name in masks else grad for name, grad in named]

    # neither fused attention nor what was compiled has a second derivative
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), uncompiled():
        total: list[Tensor] = [torch.zeros_like(w) for w in weights]
        for batch in batches:
            total = [sum_ + grad for sum_, grad in zip(total, gradients(batch, False), strict=True)]
        sought = [*weights, *beside]
        fixed, product = masked(total), [torch.zeros_like(w) for w in sought]
        for batch in batches:
            grads = gradients(batch, True)
            # off all paths to the weights, where it would raise: without this its part would be left out
            if any(node.name().endswith("autograd::Error") for node in _graph(grads, set())):
                raise RuntimeError("a function is marked with @once_differentiable")
            grads = masked(grads)
            inner = torch.stack([(g * f).sum() for g, f in zip(grads, fixed, strict=True)]).sum()
            parts = torch.autograd.grad(inner, sought, allow_unused=True, materialize_grads=True)
            product = [sum_ + part for sum_, part in zip(product, parts, strict=True)]
    return fixed, product
