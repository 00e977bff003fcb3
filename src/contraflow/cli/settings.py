"""From `PRESET --flag value ...` to a `Run`: tyro on the settings dataclasses, defaults from the preset."""

import argparse
import dataclasses
import functools
import inspect
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from contraflow.agents import needs, presets
from contraflow.cli.flags import Modules, Switch, flag_names, read_flags, registry
from contraflow.cli.moved import moved
from contraflow.core.settings import import_path, members, suggest
from contraflow.core.trust import Trust
from contraflow.core.types import UserError
from contraflow.presets import default_run, preset_run
from contraflow.training.run import Run, read_config
from contraflow.training.sources import Source


@dataclass(frozen=True)
class Train:
    """What `contraflow train` takes beside the run itself."""

    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="SEED ...")] = ()
    """Train several seeds, each into a run folder OUT/seedN; at once in one program where the environment
    is written in JAX (`contraflow list envs jax:`), else one after the other."""
    out: Path | None = None
    """Folder of the new run; None is runs/PRESET-ENV-seedN."""
    require: float | None = None
    """Exit with code 1 if the final mean return (of any seed) is below this."""
    quiet: Annotated[bool, Switch] = False
    """Print no progress."""
    trust: Modules = ""
    """Modules outside the library that may be imported, separated by commas; `all` allows any."""


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
    "env", "data", "reward", "weights", "prompts", "group", "steps", "seed", "seeds", "out", "num_envs", "collect",
    "updates", "unroll", "batch_size", "n_step", "horizon", "execute", "offline_steps", "mix", "pretrained", "base",
    "eval_every", "eval_episodes", "log_every", "trackers", "require", "quiet", "trust",
)  # fmt: skip
"""What the short help shows, in its order."""


def parse_train(preset: str, args: list[str]) -> Any:
    """`Train` and the settings of `preset` with the flags in `args` applied.

    Raises UserError, or SystemExit after a help text.
    """
    trust = _trusted(args)
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


def _trusted(args: list[str]) -> Trust:
    """What follows --trust: the preset, which decides about the flags, is found before they are read."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    flags.add_argument("--trust", default="", nargs="?", const="")
    return flags.parse_known_args(args)[0].trust


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


def find_preset(name: str, trust: Trust) -> Run:
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


def _user_agent(name: str, trust: Trust) -> Any:
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
    own = {f.name for f in dataclasses.fields(options)}
    rows = [(name, getattr(default, name), docs.get(name, "")) for name in OFTEN if name in own]
    width = max(len(name) for name, *_ in rows)
    flags = [
        f"  --{name.replace('_', '-').ljust(width)}  {re.split(r'[.;:] ', doc)[0].rstrip('.')}"
        + (f" [{_plain(value)}]" if value not in (None, (), "") and value is not False else "")
        for name, value, doc in rows
    ]
    agent: Any = run.agent
    below = [(f.name.replace("_", "-"), getattr(agent, f.name)) for f in dataclasses.fields(agent)]
    lines = [
        f"  --agent.{name}.*  {type(value).__name__}"
        if dataclasses.is_dataclass(value)
        else f"  --agent.{name} {value}"
        for name, value in below
    ]
    found = presets().get(preset)
    title = type(run.agent).__name__
    if found:
        title = f"{found.title} ({found.paper}): {found.summary}" if found.paper else f"{found.title}: {found.summary}"
    return SHORT.format(preset=preset, title=title, flags="\n".join(flags), agent="\n".join(lines))


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
            value = getattr(second.value, "value", None)
            docs |= {first.target.id: " ".join(value.split())} if isinstance(value, str) else {}
    return docs
