"""Whole-number formulas over named sizes, kept as text: `batch * cdiv(pixels, BLOCK)`.

The grid of a kernel is such a text, because five readers need it: the launcher in Python, the manifest, the C library,
TensorRT's symbolic shapes, and people.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from rt.errors import ConfigError

Function = Callable[..., Any]

_OPERATORS: dict[type[ast.operator], Function] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


_LONGEST = 500
"""Characters: ten times what any kernel has, and nothing that Python's parser cannot bear."""


def cdiv(dividend: int, divisor: int) -> int:
    """The quotient rounded up."""
    return -(-dividend // divisor)


INTEGERS: Mapping[str, Function] = {"cdiv": cdiv, "min": min, "max": max}
"""The functions that a formula may call, on plain integers."""


def evaluate(text: str, names: Mapping[str, Any], functions: Mapping[str, Function] = INTEGERS) -> Any:
    """The value of `text`, an integer where all names are; other numbers, such as symbolic ones, pass through.

    Args:
        text: Integers, names, `+ - * //`, and calls of `functions`.
        names: What each name stands for.
        functions: cdiv, min and max for the numbers in `names`.

    Raises:
        ConfigError: When the text is anything else, or names something that is not there.
    """

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int(number)) if not isinstance(number, bool):
                return number
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](value(left), value(right))
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in functions:
                return functions[name](*map(value, args))
        raise ConfigError(
            f"{ast.unparse(node)!r} in {text!r} has no value; names: {', '.join(names)}; "
            f"functions: {', '.join(functions)}; operators: + - * //"
        )

    try:
        if len(text) > _LONGEST:
            raise SyntaxError
        return value(ast.parse(text, mode="eval").body)
    except ConfigError:
        raise
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        raise ConfigError(f"{text[:_LONGEST]!r} is not a formula of whole numbers") from None
