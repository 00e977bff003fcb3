"""Settings as JSON and back. A nested dataclass is written with a `kind`, its class name; it is found again through the
annotation of the field that holds it, so there is no global table."""

import dataclasses
import importlib
import importlib.metadata
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from contraflow.core.types import UserError

SCHEMA = 2
try:
    VERSION = importlib.metadata.version("contraflow")
except importlib.metadata.PackageNotFoundError:  # a source tree that was never installed
    VERSION = "0+unknown"


def to_json(value: Any) -> Any:
    """Dataclasses, tuples, numbers, strings, None; a function is written as `module:name`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"kind": _kind(type(value)), **fields}
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    if callable(value):
        return f"{_module(value)}:{value.__qualname__}"
    return value


def from_json(
    data: Any, annotation: Any, trust: bool = False, where: str = "config", known_kinds: Mapping[str, type] = {}
) -> Any:
    """The value of type `annotation` that `to_json` wrote.

    Raises UserError for an unknown kind or field, a wrong value, or code outside the library without `trust`.
    """
    if isinstance(data, dict) and "kind" in data:
        cls = _find(data["kind"], annotation, trust, where, known_kinds)
        hints = typing.get_type_hints(cls)
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known - {"kind"})
        if unknown:
            raise UserError(f"{where}: {cls.__name__} has no field {unknown[0]!r}; {suggest(unknown[0], known)}")
        values = {k: from_json(v, hints[k], trust, f"{where}.{k}", known_kinds) for k, v in data.items() if k != "kind"}
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: {error}") from None
    if isinstance(data, list):
        item = _tuple_item(annotation)
        return tuple(from_json(v, item, trust, where) for v in data)
    if isinstance(data, str) and ":" in data and _allows_callable(annotation):
        return import_path(data, trust)
    return data


def import_path(path: str, trust: bool) -> Any:
    """The object named `module:name`. Raises UserError without `trust`, or if it does not exist."""
    if not trust:
        raise UserError(f"{path} is code outside the library; pass --trust to import it")
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"cannot import {path}: {error}; is the module on PYTHONPATH?") from None


def suggest(name: str, known: Iterable[str]) -> str:
    """A `did you mean` for a mistyped name, or the list of what there is."""
    import difflib

    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def _kind(cls: type) -> str:
    inside = cls.__module__.split(".")[0] == "contraflow"
    return cls.__name__ if inside else f"{_module(cls)}:{cls.__qualname__}"


def _module(value: Any) -> str:
    """The module to import `value` from; the name of its file for what the script that is running defines."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    return Path(file).stem if value.__module__ == "__main__" and file else value.__module__


def members(annotation: Any) -> list[Any]:
    """The types that a union is made of."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return [m for a in typing.get_args(annotation) for m in members(a)]
    if origin is typing.Annotated:
        return members(typing.get_args(annotation)[0])
    return [annotation]


def _find(kind: str, annotation: Any, trust: bool, where: str, known_kinds: Mapping[str, type]) -> type:
    if ":" in kind:
        return import_path(kind, trust)
    found = {m.__name__: m for m in members(annotation) if isinstance(m, type) and dataclasses.is_dataclass(m)}
    if not found:  # a protocol
        found = dict(known_kinds)
    if kind not in found:
        raise UserError(f"{where}: unknown kind {kind!r}; {suggest(kind, found)}")
    return found[kind]


def _tuple_item(annotation: Any) -> Any:
    for member in members(annotation):
        if typing.get_origin(member) is tuple:
            args = [a for a in typing.get_args(member) if a is not Ellipsis]
            return args[0] if len(set(args)) == 1 else typing.Union[tuple(args)]  # noqa: UP007
    return Any


def _allows_callable(annotation: Any) -> bool:
    import collections.abc

    return any(m is Any or typing.get_origin(m) is collections.abc.Callable for m in members(annotation))
