"""Flags into dataclasses by tyro, with each mistake in one line."""

import collections.abc
import contextlib
import dataclasses
import difflib
import io
import math
import re
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from contraflow.cli.moved import moved
from contraflow.core.errors import UserError
from contraflow.core.settings import import_path
from contraflow.core.trust import Trust

Switch = tyro.conf.FlagCreatePairsOff
Modules = Annotated[Trust, tyro.conf.arg(metavar="MODULE,...")]


def read_flags(cls: Any, args: list[str], **options: Any) -> Any:
    """`tyro.cli`, with each mistake in one line. Raises UserError for it, SystemExit after a help text."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options = {"registry": registry(trust="")} | options
            found, unknown = tyro.cli(cls, args=args, return_unknown_args=True, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_sentence(said.getvalue())) from None
    if unknown:
        raise UserError(_unknown(unknown[0].partition("=")[0], options.get("default", found)))
    return found


def _sentence(box: str) -> str:
    """The message in a box of tyro's: its title is in the frame or, where that cannot be drawn, above a first rule."""
    lines = [line.strip(" │") for line in box.splitlines()]
    parts = re.split(r"\n[─-]{4,}\n", "\n".join(line for line in lines if line and line[0] not in "╭╰"))
    message = parts[0] if box.lstrip().startswith("╭") else parts[1]
    return re.sub(r"^Error parsing (?!--)[^:]*: ", "", " ".join(message.split()))


def _unknown(flag: str, known: Any) -> str:
    if not flag.startswith("-"):
        return f"nothing is called {flag} here: settings are given as --name value"
    name, names = flag.replace("_", "-"), list(flag_names(known))
    prefix = "--agent."
    if name.startswith(prefix):
        own = {known.removeprefix(prefix) for known in names if known.startswith(prefix)}
        if new := moved(name.removeprefix(prefix), own):
            return f"{flag} is now {prefix}{new}"
    # What was mistyped is mostly the last word; the words before it are often left out.
    before, dot, word = name.rpartition(".")
    words = difflib.get_close_matches(word, {n.rpartition(".")[2] for n in names}, n=1, cutoff=0.75) if dot else []
    same = [n for n in names if words and n.rpartition(".")[2] == words[0]]
    same = [n for n in same if n.rpartition(".")[0] == before] or same
    close = difflib.get_close_matches(name, same or names, n=3 if same else 1, cutoff=0.0 if same else 0.6)
    return f"there is no flag {flag}; " + (
        f"did you mean {' or '.join(sorted(close))}?" if close else "--help-all lists them"
    )


def flag_names(settings: Any, prefix: str = "--") -> Iterator[str]:
    """The flags of a dataclass, and of the dataclasses in its fields."""
    for f in dataclasses.fields(settings):
        name, value = f"{prefix}{f.name.replace('_', '-')}", getattr(settings, f.name)
        yield name
        if dataclasses.is_dataclass(value):
            yield from flag_names(value, f"{name}.")


def registry(trust: Trust) -> ConstructorRegistry:
    """How flags are read that are functions, or whole numbers."""
    rules = ConstructorRegistry()

    @rules.primitive_rule
    def function(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        """A setting that may be a function must have a form on the command line: `module:function`."""
        if collections.abc.Callable not in (info.type, typing.get_origin(info.type)):
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="MODULE:FUNCTION",
            instance_from_str=lambda args: import_path(args[0], trust),
            is_instance=callable,
            str_from_instance=lambda f: [f"{f.__module__}:{f.__qualname__}"],
        )

    @rules.primitive_rule
    def whole(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        """Whole numbers may be written 1e5."""
        if info.type is not int:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="INT",
            instance_from_str=lambda args: _whole(args[0]),
            is_instance=lambda value: type(value) is int,
            str_from_instance=lambda value: [str(value)],
        )

    return rules


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not value.is_integer():
            raise ValueError(f"{text} is not a whole number") from None
        return int(value)
