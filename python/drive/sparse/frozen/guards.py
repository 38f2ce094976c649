"""What must hold of the inputs' sizes for a graph to be theirs, as the exporter says it: small expressions.

They come from files too, so they are not run as Python but read: sizes, numbers, arithmetic, comparisons.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_SIZE = re.compile(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]")
_BINARY: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.Eq: operator.eq,
    ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE:
    operator.ge,
}  # fmt: skip
_CALLS: dict[str, Callable[..., Any]] = {"sym_max": max, "sym_min": min, "max": max, "min": min}


def readable(guard: str, inputs: Sequence[str]) -> bool:
    """Can `holds` decide it?"""
    try:
        sizes = {name: range(2, 66) for name in inputs}  # of more dimensions than inputs have
        _value(_parsed(guard), sizes)
    except (KeyError, IndexError, SyntaxError, TypeError, ValueError, ArithmeticError, RecursionError):
        return False
    return True


def holds(guard: str, sizes: Mapping[str, Sequence[int]]) -> bool:
    """Is it true of inputs of these sizes? False if it cannot be read."""
    try:
        return bool(_value(_parsed(guard), sizes))
    except (KeyError, IndexError, SyntaxError, TypeError, ValueError, ArithmeticError, RecursionError):
        return False


def plain(guard: str) -> str:
    """For a reader."""
    return _SIZE.sub(r"\1.shape[\2]", guard).replace("torch.sym_", "")


def _parsed(guard: str) -> ast.expr:
    return ast.parse(_SIZE.sub(r"\1[\2]", guard), mode="eval").body


def _value(tree: ast.expr, sizes: Mapping[str, Sequence[int]]) -> Any:
    match tree:
        case ast.Constant(value=bool() | int() | float() as value):
            return value
        case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=int() as dimension)):
            return sizes[name][dimension]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, sizes)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, sizes)
        case ast.BinOp(left=left, op=op, right=right):
            return _BINARY[type(op)](_value(left, sizes), _value(right, sizes))
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            terms = [_value(term, sizes) for term in (left, *comparators)]
            pairs = zip(ops, terms, terms[1:], strict=False)
            return all(_BINARY[type(op)](a, b) for op, a, b in pairs)
        case ast.BoolOp(op=op, values=values):
            found = [_value(value, sizes) for value in values]
            return all(found) if isinstance(op, ast.And) else any(found)
        case ast.Call(
            func=ast.Name(id=name) | ast.Attribute(value=ast.Name(id="torch"), attr=name), args=args
        ):
            return _CALLS[name](*(_value(argument, sizes) for argument in args))
    raise ValueError(f"guards: an expression must be of sizes and numbers, got {ast.dump(tree)[:80]}")
