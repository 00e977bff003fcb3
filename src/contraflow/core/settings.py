"""Settings as JSON and back.

A nested dataclass is written with a `kind`, its class name. It is found again through the annotation of its field, or,
for a protocol such as the field `agent`, through a table of classes given by the reader. `to_json` refuses anything
that could not be read back.
"""

import collections.abc
import dataclasses
import importlib
import json
import math
import sys
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any

from contraflow.core.errors import UserError
from contraflow.core.trust import Trust, admit

SCHEMA = 2
Classes = Mapping[str, type]
SCALARS = (bool, int, float, str, type(None))


def version() -> str:
    """Returns the version of the library."""
    import importlib.metadata

    try:
        return importlib.metadata.version("contraflow")
    except importlib.metadata.PackageNotFoundError:  # a source tree that is not installed
        return "0+unknown"


def to_json(value: Any, where: str = "settings") -> Any:
    """Returns JSON for dataclasses, tuples, numbers, strings and None; a function is written as `module:name`.

    Raises UserError for anything that could not be read back: a function or class that is not at the top of a module,
    a value that the annotation of its field does not allow, or an object of another kind.
    """
    own: dict[str, type] = {}
    data = _written(value, where, own)
    if dataclasses.is_dataclass(value):
        again = from_json(json.loads(json.dumps(data)), type(value), "all", where, own)
        if again != value:
            raise UserError(f"{where}: {value} would be read back as {again}: use plain values")
    return data


def _written(value: Any, where: str, own: dict[str, type]) -> Any:
    """Returns the JSON and adds the classes met on the way to `own`."""
    if isinstance(value, SCALARS):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        own[cls.__name__] = cls
        names = [f.name for f in dataclasses.fields(value)]
        kind = cls.__name__ if cls.__module__.split(".")[0] == "contraflow" else _path(cls, where)
        return {"kind": kind, **{n: _written(getattr(value, n), f"{where}.{n}", own) for n in names}}
    if isinstance(value, tuple | list):
        return [_written(v, where, own) for v in value]
    if callable(value):
        return _path(value, where)
    raise UserError(f"{where}: a {type(value).__name__} cannot be written: give a number, a string or a dataclass")


def _path(value: Any, where: str) -> str:
    """Returns `module:name`, under which `value` can be imported."""
    name = getattr(value, "__qualname__", "")
    module = sys.modules.get(getattr(value, "__module__", None) or "")
    if not name or getattr(module, name, None) is not value:
        what = name or type(value).__name__
        raise UserError(
            f"{where}: {what} cannot be written because it cannot be imported: define it at the top of a module"
        )
    return f"{main_name() if value.__module__ == '__main__' else value.__module__}:{name}"


def main_name() -> str:
    """Returns the name under which other modules import the running one."""
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    return spec.name if spec else Path(file).stem if file else "__main__"


def from_json(
    data: Any, annotation: Any, trust: Trust = "", where: str = "settings", classes: Classes = MappingProxyType({})
) -> Any:
    """Returns the value of type `annotation` that `to_json` wrote; an int is accepted for a float.

    `classes` maps names to the classes allowed where the annotation is a protocol. Raises UserError for an unknown kind
    or field, a value of the wrong type or out of range, and code outside the library that `trust` does not name.
    """
    options = members(annotation)
    if isinstance(data, dict):
        return _object(data, options, trust, where, classes)
    if isinstance(data, list):
        for option in options:
            if (items := _items(option, len(data))) is not None:
                pairs = enumerate(zip(data, items, strict=True))
                return tuple(from_json(v, item, trust, f"{where}[{i}]", classes) for i, (v, item) in pairs)
        if Any in options:
            return tuple(from_json(v, Any, trust, where, classes) for v in data)
    elif (
        Any in options
        or type(data) in options
        or (data is None and None in options)
        or any(typing.get_origin(o) is typing.Literal and data in typing.get_args(o) for o in options)
    ):
        return data
    elif type(data) is int and float in options:
        return float(data)
    elif isinstance(data, str) and any(_is_callable(o) for o in options):
        return import_path(data, trust)
    raise UserError(f"{where} must be {' or '.join(_words(o) for o in options)}, got {json.dumps(data)[:80]}")


def _object(data: dict[str, Any], options: list[Any], trust: Trust, where: str, classes: Classes) -> Any:
    kind = data.get("kind")
    if not isinstance(kind, str):
        raise UserError(f"{where}: an object needs a kind, its class name, got {json.dumps(data)[:80]}")
    cls = _find(kind, options, trust, where, classes)
    try:
        hints = typing.get_type_hints(cls)
    except Exception as error:  # annotations may run user code
        raise UserError(f"{where}: the annotations of {kind} cannot be read ({error})") from None
    known = {f.name for f in dataclasses.fields(cls) if f.init}
    if unknown := sorted(set(data) - known - {"kind"}):
        raise UserError(f"{where}: {cls.__name__} has no field {unknown[0]!r}; {suggest(unknown[0], known)}")
    values = {k: from_json(v, hints[k], trust, f"{where}.{k}", classes) for k, v in data.items() if k != "kind"}
    try:
        return cls(**values)
    except Exception as error:  # a class, perhaps user-defined, may raise anything for bad values
        raise UserError(f"{where}: {error}") from None


def _find(kind: str, options: list[Any], trust: Trust, where: str, classes: Classes) -> type:
    if ":" in kind:
        cls = import_path(kind, trust)
        if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
            raise UserError(f"{where}: {kind} is not a dataclass")
        return cls
    known = {o.__name__: o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)}
    if any(o is Any or getattr(o, "_is_protocol", False) for o in options):
        known |= classes
    if kind not in known:
        raise UserError(f"{where}: unknown kind {kind!r}; {suggest(kind, known)}")
    return known[kind]


def check_schema(data: Any, file: Path) -> None:
    """Raises UserError for a file that contraflow did not write, or that another release wrote in another schema."""
    schema = data.get("schema") if isinstance(data, dict) else None
    if type(schema) is not int:
        raise UserError(f"{file} was not written by contraflow (it has no schema number)")
    if schema != SCHEMA:
        remedy = "upgrade contraflow" if schema > SCHEMA else "use the release that wrote it, or create it again"
        raise UserError(f"{file} uses schema {schema}, this release reads {SCHEMA}: {remedy}")


def import_path(path: str, trust: Trust) -> Any:
    """Returns the object `module:name`. Raises UserError for a module that is not trusted, or a name not found."""
    admit(path, trust)
    module, _, name = path.partition(":")
    try:
        # The running script is not imported a second time, because its classes would differ from the first ones.
        found = sys.modules["__main__"] if module == main_name() else importlib.import_module(module)
        return getattr(found, name)
    except Exception as error:  # importing runs user code
        raise UserError(f"cannot import {path}: {error}; is the module installed or in this folder?") from None


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns a `did you mean` for a mistyped name, or the list of known names."""
    import difflib

    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def members(annotation: Any) -> list[Any]:
    """Returns the types in a union."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, UnionType):
        return [m for a in typing.get_args(annotation) for m in members(a)]
    if origin is typing.Annotated:
        return members(typing.get_args(annotation)[0])
    if annotation is object or isinstance(annotation, typing.TypeVar):
        return [Any]
    return [annotation]


def first_difference(old: Any, new: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """Returns (dotted name, old, new) of the first field in which two JSON values differ, or None."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            if found := first_difference(old.get(key), new.get(key), f"{where}.{key}".lstrip(".")):
                return found
        return None
    same = old == new or (isinstance(old, float) and isinstance(new, float) and math.isnan(old) and math.isnan(new))
    return None if same else (where, old, new)


def _items(option: Any, length: int) -> list[Any] | None:
    """Returns the annotation of each item of a tuple (or list) type that allows this length, or None."""
    if option in (tuple, list):
        return [Any] * length
    args = typing.get_args(option)
    if typing.get_origin(option) in (list, collections.abc.Sequence) or args[1:] == (Ellipsis,):
        return [args[0]] * length
    return list(args) if typing.get_origin(option) is tuple and len(args) == length else None


def _is_callable(option: Any) -> bool:
    return collections.abc.Callable in (option, typing.get_origin(option)) or option is type


def _words(option: Any) -> str:
    if typing.get_origin(option) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(option)))
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(option) or getattr(option, "__name__", None) or str(option).replace("typing.", "")
