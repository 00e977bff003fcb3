"""From `PRESET --flag value ...` to a `Run`: tyro on the settings dataclasses, defaults from the preset."""

import collections.abc
import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from contraflow.agents import needs, presets
from contraflow.cli.moved import moved
from contraflow.core.settings import import_path, members, suggest
from contraflow.core.types import UserError
from contraflow.presets import default_run, preset_run
from contraflow.training.run import Run, read_config
from contraflow.training.sources import Source

Switch = tyro.conf.FlagCreatePairsOff


@dataclass(frozen=True)
class Train:
    """What `contraflow train` takes beside the run itself."""

    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="SEED ...")] = ()
    """In place of --seed: train these, each into a run folder OUT/seedN; at once in one program where the environment
    is written in JAX (`contraflow list envs jax:`), else one after the other."""
    out: Path | None = None
    """New folder for the run; None is runs/PRESET-ENV-seedN."""
    require: float | None = None
    """Exit with code 1 when the final mean return, with --seeds of any of them, is below this."""
    quiet: Annotated[bool, Switch] = False
    """No progress bar."""
    trust: Annotated[bool, Switch] = False
    """Import code named `module:Class` (agents, environments, functions)."""


DESCRIPTION = """Train {preset}.

A setting with several kinds is switched by a word, its own flags follow:
contraflow train {preset} agent.solver:heun --agent.solver.steps 5"""

SHORT = """\
usage: contraflow train {preset} [--FLAG VALUE ...] [agent.SETTING:KIND ...]

{title}

{flags}

settings of the agent, with what lies below them (--help-all explains each):
{agent}

--help-all lists every setting, its kinds and its default."""
OFTEN = (
    "env", "data", "steps", "seed", "seeds", "out", "num_envs", "collect", "updates", "unroll", "batch_size", "n_step",
    "horizon", "execute", "offline_steps", "mix", "pretrained", "eval_every", "eval_episodes", "log_every", "trackers",
    "require", "quiet", "trust",
)  # fmt: skip
"""What the short help shows, in its order."""


def parse_train(preset: str, args: list[str]) -> Any:
    """`Train` and the settings of `preset` with the flags in `args` applied.

    Raises UserError, or SystemExit after a help text.
    """
    trust = "--trust" in args
    run, args = _with_source(find_preset(preset, trust), args)
    options = _options(run)
    values = {f.name: getattr(run, f.name) for f in dataclasses.fields(run)}
    values |= {f.name: getattr(run.source, f.name) for f in dataclasses.fields(run.source)}
    default = options(**values)
    if {"-h", "--help"} & set(args):
        print(short_help(preset, run, options, default))
        raise SystemExit(0)
    args = ["--help" if arg == "--help-all" else arg for arg in args]
    return read_flags(
        options,
        choices_first(args, run.agent),
        prog=f"contraflow train {preset}",
        description=DESCRIPTION.format(preset=preset),
        default=default,
        config=(tyro.conf.CascadeSubcommandArgs,),
        registry=registry(trust),
    )


def read_flags(cls: Any, args: list[str], **options: Any) -> Any:
    """`tyro.cli`, with each mistake in one line. Raises UserError for it, SystemExit after a help text."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found, unknown = tyro.cli(cls, args=args, return_unknown_args=True, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_sentence(said.getvalue())) from None
    if unknown:
        raise UserError(_unknown(unknown[0].partition("=")[0], options.get("default", found)))
    return found


def _sentence(box: str) -> str:
    """The message in a box of tyro's."""
    lines = [re.sub(r"^[│|]|[│|]$", "", line.strip()).strip() for line in box.splitlines()]
    lines = [line for line in lines if line and not re.match(r"[╭╰+]", line)]
    if len(lines) > 1 and re.match(r"[─-]{4}", lines[1]):  # a box without lines has its title inside
        lines = lines[2:]
    end = next((i for i, line in enumerate(lines) if re.match(r"[─-]{4}", line)), len(lines))
    return re.sub(r"^Error parsing (?!--)[^:]*: ", "", " ".join(lines[:end]))


def _unknown(flag: str, known: Any) -> str:
    if not flag.startswith("-"):
        return f"nothing is called {flag} here: settings are given as --name value"
    name, names = flag.replace("_", "-"), list(flag_names(known))
    prefix = "--agent."
    if name.startswith(prefix):
        own = {known.removeprefix(prefix) for known in names if known.startswith(prefix)}
        if new := moved(name.removeprefix(prefix), own):
            return f"{flag} is now {prefix}{new}"
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"there is no flag {flag}; " + (f"did you mean {close[0]}?" if close else "--help-all lists them")


def flag_names(settings: Any, prefix: str = "--") -> Iterator[str]:
    """The flags of a dataclass, and of the dataclasses in its fields."""
    for f in dataclasses.fields(settings):
        name, value = f"{prefix}{f.name.replace('_', '-')}", getattr(settings, f.name)
        yield name
        if dataclasses.is_dataclass(value):
            yield from flag_names(value, f"{name}.")


def _options(run: Run) -> Any:
    """A class with the fields of the run, of its source and of `Train` side by side, so that no flag has a prefix.

    The agent is that of the preset, so that its flags are known at once and no word is needed to choose it.
    """
    agent = ("agent", type(run.agent), field(default=run.agent))
    source = ("source", tyro.conf.Suppress[type(run.source)], field(default=run.source))
    return dataclasses.make_dataclass(
        "Options",
        [agent, source],
        bases=(Train, type(run.source), Run),
        frozen=True,
        namespace={"__post_init__": lambda self: as_run(self) and None},
    )


def as_run(options: Any) -> Run:
    """The run without the options of the command."""
    kind = type(options.source)
    source = kind(**{f.name: getattr(options, f.name) for f in dataclasses.fields(kind)})
    own = {f.name: getattr(options, f.name) for f in dataclasses.fields(Run)}
    return Run(**own | {"source": source})


def _with_source(run: Run, args: list[str]) -> tuple[Run, list[str]]:
    """The run with the source that a word `source:KIND` names, and the other words."""
    words = [arg for arg in args if arg.startswith("source:")]
    if not words:
        return run, args
    kinds = {kebab(kind.__name__): kind for kind in typing.get_args(Source)}
    name = words[-1].partition(":")[2]
    if name not in kinds:
        raise UserError(f"{words[-1]}: there is no source {name}; {suggest(name, kinds)}")
    kind, old = kinds[name], run.source
    shared = {f.name for f in dataclasses.fields(kind)} & {f.name for f in dataclasses.fields(old)}
    try:
        run = dataclasses.replace(run, source=kind(**{name: getattr(old, name) for name in shared}))
    except ValueError as error:
        raise UserError(str(error)) from None
    return run, [arg for arg in args if arg not in words]


def find_preset(name: str, trust: bool) -> Run:
    """A preset by name, a `module:Class` agent, or the run of a run folder or config.json."""
    if name in presets():
        return preset_run(name)
    if Path(name).exists():
        return read_config(Path(name), trust)
    if ":" in name:
        agent = _user_agent(name, trust)
        needs(agent)
        return default_run(agent)
    if "/" in name or name.endswith(".json"):
        raise UserError(f"{name} does not exist: give a preset, a run folder or a config.json")
    raise UserError(f"there is no preset {name}; {suggest(name, presets())}; `contraflow list presets` describes them")


def _user_agent(name: str, trust: bool) -> Any:
    cls = import_path(name, trust)
    missing = [part for part in ("init", "policy", "update") if not hasattr(cls, part)]
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen):  # pyright: ignore[reportAttributeAccessIssue]
        raise UserError(f"{name} is not an agent: an agent is a class under @dataclass(frozen=True)")
    if missing:
        raise UserError(
            f"{name} is not an agent: it lacks {', '.join(missing)} (contraflow.agents.base says what they do)"
        )
    try:
        return cls()
    except (TypeError, ValueError) as error:
        raise UserError(
            f"agent {name} cannot be built without arguments ({error}): give every field a default"
        ) from None


def choices_first(args: list[str], agent: Any) -> list[str]:
    """Words like `agent.solver:heun` moved to the front, parents before children, so that order does not matter.

    Raises UserError with a suggestion for a word that names no field or no kind of the agent.
    """
    words = [arg for arg in args if re.fullmatch(r"agent(\.[\w-]+)+:[\w-]+", arg)]
    words.sort(key=lambda word: word.count("."))
    for word in words:
        path, _, kind = word.partition(":")
        parent, _, name = path.replace("-", "_").rpartition(".")
        if any(other.startswith(f"{parent}:") for other in words):
            continue  # the parent is another than the preset's: tyro knows
        owner = functools.reduce(lambda value, part: getattr(value, part, None), parent.split(".")[1:], agent)
        if dataclasses.is_dataclass(owner):
            hints = typing.get_type_hints(type(owner))
            if name not in hints:
                own = {flag.removeprefix("--") for flag in flag_names(agent)}
                if new := moved(path.removeprefix("agent."), own):
                    raise UserError(f"{word} is now agent.{new}:{kind}")
                raise UserError(f"{word}: {type(owner).__name__} has no setting {name}; {suggest(name, hints)}")
            union = members(hints[name])
            kinds = [kebab(member.__name__) for member in union if isinstance(member, type)]
            if len(kinds) == len(union) and kind not in kinds:
                raise UserError(f"{word}: there is no kind {kind}; {suggest(kind, kinds)}")
    return words + [arg for arg in args if arg not in words]


def kebab(name: str) -> str:
    """MinVariance -> min-variance, RK4 -> rk4, NoneType -> none: the words of tyro."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name.removesuffix("Type")).lower()


# the short help


def short_help(preset: str, run: Run, options: Any, default: Any) -> str:
    """The flags that people set, a line each, and the names of the agent's settings."""
    docs = {name: doc for cls in options.__mro__[::-1] for name, doc in field_docs(cls).items()}
    rows = []
    for name in OFTEN:
        if name in {f.name for f in dataclasses.fields(options)}:
            value = getattr(default, name)
            shown = "" if value in (None, (), "", False) else f" [{_plain(value)}]"
            rows.append((f"--{name.replace('_', '-')}", docs.get(name, "").partition(". ")[0].rstrip(".") + shown))
    width = max(len(flag) for flag, _ in rows)
    flags = "\n".join(f"  {flag.ljust(width)}  {text}" for flag, text in rows)
    below = []
    for f in dataclasses.fields(run.agent):
        value = getattr(run.agent, f.name)
        inside = "..." if dataclasses.is_dataclass(value) else f" {_plain(value)}"
        below.append(f"--agent.{f.name.replace('_', '-')}{'.' * dataclasses.is_dataclass(value)}{inside}".replace("....", ".…"))
    found = presets().get(preset)
    title = f"{found.title} ({found.paper}). {found.summary}" if found and found.paper else found.title if found else preset
    return SHORT.format(preset=preset, title=title, flags=flags, agent="  " + "\n  ".join(below))


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else f"{value:_}" if type(value) is int else str(value)


def field_docs(cls: type) -> dict[str, str]:
    """The string below each field of a class, as its help text."""
    import ast
    import textwrap

    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):  # made on the fly
        return {}
    (node,) = (n for n in tree.body if isinstance(n, ast.ClassDef))
    docs = {}
    for first, second in zip(node.body, node.body[1:], strict=False):
        if isinstance(first, ast.AnnAssign) and isinstance(first.target, ast.Name) and isinstance(second, ast.Expr):
            if isinstance(second.value, ast.Constant) and isinstance(second.value.value, str):
                docs[first.target.id] = " ".join(second.value.value.split())
    return docs


def registry(trust: bool) -> ConstructorRegistry:
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
            value = 0.5
        if value != int(value):
            raise ValueError(f"{text} is not a whole number") from None
        return int(value)
