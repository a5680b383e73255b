"""JSON values into frozen dataclasses, each checked against its annotation; `asdict` is the inverse."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from rt.errors import shown

T = TypeVar("T")

_EXPECTED = {
    str: "a text",
    int: "a whole number of at most 64 bits",
    float: "a finite number",
    bool: "true or false",
    NoneType: "null",
    list: "a list",
}


def decode(kind: type[T], data: Any, where: str = "") -> T:
    """The `kind`, a dataclass, that `data` describes: its fields by name, those with a default may be left out.

    Fields may be str, int, float, bool, None, Any, enums of texts, dataclasses, `X | Y`, tuples, lists and mappings of
    these.

    Args:
        kind: The dataclass.
        data: As a reader of JSON gives it.
        where: What it is called in errors.

    Raises:
        ValueError: Something has another type than its annotation, is missing, or is not known; or what the class
            itself raises for a value without meaning. Says where, what was got and what is expected.
    """
    return cast(T, _value(kind, data, where or kind.__name__))


def _value(kind: Any, data: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return data
    if origin in (Union, UnionType):
        return _first(arguments, data, where)
    if origin is tuple:
        return _items(arguments, data, where)
    if origin is list:
        items = _expect(list, "a list", data, where)
        return [_value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(items)]
    if origin is Mapping:
        of_key, of_value = arguments
        names = _expect(dict, "an object", data, where)
        return {
            _value(of_key, key, where): _value(of_value, value, f"{where}.{_named(key)}")
            for key, value in names.items()
        }
    if is_dataclass(kind):
        return _object(kind, data, where)
    if issubclass(kind, Enum):
        text = _value(str, data, where)
        valid = [member.value for member in kind]
        return kind(text) if text in valid else _refuse(f"one of {', '.join(valid)}", data, where)
    if kind is float and type(data) is int and abs(data) < 2**63:
        return float(data)
    fits = type(data) is kind  # not isinstance: True is an int
    if kind is int:
        fits = fits and -(2**63) <= data < 2**63
    if kind is float:
        fits = fits and math.isfinite(data)
    return data if fits else _refuse(_EXPECTED[kind], data, where)


def _first(kinds: tuple[Any, ...], data: Any, where: str) -> Any:
    """As the first of several types that fits; the error is that of a type which is more than a name of one."""
    problems = []
    for kind in kinds:
        try:
            return _value(kind, data, where)
        except ValueError as error:
            problems.append((is_dataclass(kind), error))
    if isinstance(data, dict) and (of_objects := [error for is_object, error in problems if is_object]):
        raise of_objects[0]
    return _refuse(
        " or ".join(_EXPECTED.get(get_origin(kind) or kind, "an object") for kind in kinds), data, where
    )


def _items(kinds: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    items = _expect((list, tuple), "a list", data, where)  # `asdict` keeps tuples
    if kinds[1:] == (...,):
        kinds = kinds[:1] * len(items)
    if len(items) != len(kinds):
        _refuse(f"a list of {len(kinds)}", data, where)
    return tuple(
        _value(k, item, f"{where}[{i}]") for i, (k, item) in enumerate(zip(kinds, items, strict=True))
    )


def _object(kind: Any, data: Any, where: str) -> Any:
    names, known = _expect(dict, "an object", data, where), _fields(kind)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{where} has {_named(unknown[0])}, which is not known")
    if missing := [name for name, (_, required) in known.items() if required and name not in names]:
        raise ValueError(f"{where} has no {missing[0]}")
    values = {name: _value(known[name][0], value, f"{where}.{name}") for name, value in names.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


@cache
def _fields(kind: Any) -> dict[str, tuple[Any, bool]]:
    """The type of each field, and whether it must be there."""
    types = get_type_hints(kind)
    return {
        field.name: (types[field.name], field.default is MISSING and field.default_factory is MISSING)
        for field in fields(kind)
    }


def _expect(kind: Any, name: str, data: Any, where: str) -> Any:
    return data if isinstance(data, kind) else _refuse(name, data, where)


def _named(key: Any) -> str:
    return shown(key).strip("'")


def _refuse(expected: str, data: Any, where: str) -> Any:
    raise ValueError(f"{where} is {shown(data)}, expected {expected}")
