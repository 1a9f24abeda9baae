"""Frozen dataclasses as configs: strict JSON in and out, and ids.

An id is the sha256 of the canonical JSON of the fields that differ from their default, plus the
schema number: adding a field with a default keeps every old id. Standard library only.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from typing import Any, Literal, TypeVar

SCHEMA = 2
"""of ids; 2 since keys are smeared by default"""

T = TypeVar("T")


class BadInput(Exception):
    """A user's mistake. The text is one line: the value, the limit, the remedy (exit code 2)."""


def to_json(config: Any) -> dict[str, Any]:
    """Turn a config (nested dataclasses) into plain JSON values, every field present."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def from_json(cls: type[T], values: dict[str, Any], where: str = "config") -> T:
    """Build a `cls` from plain JSON values; unknown fields and wrong types raise BadInput."""
    if not isinstance(values, dict):
        raise BadInput(f"{where} is {type(values).__name__}, not an object; give one {{...}}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]}?" if near else f"fields are {', '.join(names)}"
            raise BadInput(f"{where} has no field {name!r}; {hint}")
    kept = {k: _checked(hints[k], v, f"{where}.{k}") for k, v in values.items()}
    try:
        return cls(**kept)
    except TypeError as missing:
        raise BadInput(f"{where} is incomplete: {missing}") from None


def require(name: str, value: float, low: float, high: float) -> None:
    """Refuse (BadInput) a number that is not within low..high, NaN included."""
    if not low <= value <= high:
        raise BadInput(f"{name}={value} is not within {low:g} to {high:g}; choose a value there")


def canonical(value: Any) -> str:
    """Give the one JSON text of a value: sorted keys, no spaces, no NaN or infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """Give the sha256 (64 hex digits) of a value's canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def identity(config: Any) -> str:
    """Give a config's id: 16 hex digits over its type and its fields that are not default."""
    return digest({"schema": SCHEMA, "kind": type(config).__name__, **_changed(config)})[:16]


def _changed(config: Any) -> dict[str, Any]:
    out = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        default = f.default_factory() if callable(f.default_factory) else f.default
        if dataclasses.is_dataclass(value):
            inner = _changed(value)
            if inner or type(value) is not type(default):
                out[f.name] = inner
        elif value != default:
            out[f.name] = _plain(value)
    return out


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_json(value)
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


def _checked(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value, where)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _checked(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal:
        if value not in args:
            raise BadInput(f"{where} is {value!r}; choose one of {', '.join(map(str, args))}")
        return value
    if origin is tuple and isinstance(value, list | tuple):
        inner = args[:1] * len(value) if args[1:] == (...,) else args
        return tuple(_checked(a, v, where) for a, v in zip(inner, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or isinstance(value, bool)
                                   and hint is not bool):
        raise BadInput(f"{where} is {value!r}; it must be {hint.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadInput(f"{where} is {value}; it must be a finite number")
    return value
