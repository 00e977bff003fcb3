"""MkDocs hook: pages of the reference are made from the code when the site is built.

In a page, a line `{{ settings module:Class }}` becomes the table of a dataclass (field, default, what it is),
`{{ api module }}` the public classes and functions of a module with their docstrings, `{{ agents }}` the table of
methods. A name that does not exist stops the build.
"""

import ast
import dataclasses
import inspect
import re
import textwrap
from importlib import import_module
from typing import Any

from contraflow.agents import presets

MARK = re.compile(r"^\{\{ (settings|api|agents) ?(\S*) \}\}$", re.MULTILINE)


def on_page_markdown(markdown: str, **_) -> str:
    """The page with its marks replaced."""
    return MARK.sub(lambda mark: {"settings": settings, "api": api, "agents": agents}[mark[1]](mark[2]), markdown)


def settings(place: str) -> str:
    """The fields of the dataclass `module:Class`."""
    module, _, name = place.partition(":")
    cls = getattr(import_module(module), name)
    told, rows = docstrings(cls), []
    for field in dataclasses.fields(cls):
        rows.append(f"| `{field.name}` | {default(field)} | {cell(told.get(field.name, ''))} |")
    head = f"### `{name}`\n\n{paragraph(cls)}\n\n`from {module} import {name}`\n"
    return head + ("\n| field | default | |\n|---|---|---|\n" + "\n".join(rows) + "\n" if rows else "")


def api(module: str) -> str:
    """Public names that the module defines itself, in the order of its source."""
    found = import_module(module)
    own = [
        (name, value)
        for name, value in vars(found).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module
        and value.__doc__
    ]
    return "\n".join([paragraph(found), "", *(entry(name, value) for name, value in own)])


def agents(_: str) -> str:
    """One row for each preset."""
    paper = lambda p: f"[{p.paper}](https://arxiv.org/abs/{p.paper})" if p.paper else "ours"
    rows = [f"| `{p.name}` | {p.title}: {p.summary} | {p.needs} | {paper(p)} |" for p in presets().values()]
    return "| name | method | learns from | paper |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def entry(name: str, value: Any) -> str:
    """A class or function with its signature and docstring, a class with its public methods."""
    lines = [f"### `{name}{signature(value)}`", "", paragraph(value), ""]
    if inspect.isclass(value):
        for key, method in vars(value).items():
            function = method.__func__ if isinstance(method, classmethod | staticmethod) else method
            if not key.startswith("_") and inspect.isfunction(function) and function.__doc__:
                lines += [f"**`.{key}{signature(function)}`**", "", paragraph(function), ""]
    return "\n".join(lines)


def signature(value: Any) -> str:
    """Names of the arguments, without their types, which the docstring says in words and shapes."""
    try:
        names = [
            ("*" if p.kind is p.VAR_POSITIONAL else "**" if p.kind is p.VAR_KEYWORD else "") + p.name
            for p in inspect.signature(value).parameters.values()
            if p.name != "self"
        ]
    except (TypeError, ValueError):
        return ""
    return f"({', '.join(names)})"


def default(field: dataclasses.Field) -> str:
    """The default in one cell."""
    value = field.default
    if value is dataclasses.MISSING:
        value = field.default_factory() if field.default_factory is not dataclasses.MISSING else "required"
    text = type(value).__name__ + "(...)" if dataclasses.is_dataclass(value) and len(repr(value)) > 48 else repr(value)
    return "required" if value == "required" else f"`{cell(text)}`"


def docstrings(cls: type) -> dict[str, str]:
    """The string below each field, of the class and of those that it inherits from."""
    found: dict[str, str] = {}
    for kind in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(kind):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
        assert isinstance(body, ast.ClassDef)
        for line, after in zip(body.body, body.body[1:], strict=False):
            match line, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = text
    return found


def paragraph(value: Any) -> str:
    """The docstring, where what is set off by spaces (equations) stays set off."""
    blocks = re.split(r"\n\s*\n", inspect.getdoc(value) or "")
    return "\n\n".join(
        block if not re.match(r" {2,}", block) else f"```text\n{block}\n```" for block in map(guard, blocks)
    )


def guard(block: str) -> str:
    """Text that Markdown would take for something else."""
    return block if block.startswith("  ") else re.sub(r"([*_|$<\\])", r"\\\1", block).replace("\\_", "\\_")


def cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()
