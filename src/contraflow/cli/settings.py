"""From `PRESET --flag value ...` to a `Run`: tyro on the settings dataclasses, defaults from the preset."""

import collections.abc
import dataclasses
import functools
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from contraflow.core.settings import import_path, members, suggest
from contraflow.core.types import UserError
from contraflow.presets import PRESETS
from contraflow.train.run import AnyRun, Run, read_config

Switch = tyro.conf.FlagCreatePairsOff


@dataclass(frozen=True)
class Train:
    """What `contraflow train` takes beside the run itself."""

    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="SEED ...")] = ()
    """In place of --seed: train these at once in one program, each into a run folder OUT/seedN. For environments
    written in JAX (`contraflow list envs jax:`)."""
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


def parse_train(preset: str, args: list[str]) -> Any:
    """`Train` and the settings of `preset` with the flags in `args` applied.

    Raises UserError, or SystemExit after tyro's message.
    """
    trust = "--trust" in args
    run = find_preset(preset, trust)
    # The agent is that of the preset, so that its flags are known at once and no word is needed to choose it.
    agent = ("agent", type(run.agent), field(default=run.agent))
    options = dataclasses.make_dataclass("Train", [agent], bases=(Train, type(run)), frozen=True)
    default = options(**{f.name: getattr(run, f.name) for f in dataclasses.fields(run)})
    return tyro.cli(
        options,
        prog=f"contraflow train {preset}",
        description=DESCRIPTION.format(preset=preset),
        default=default,
        args=choices_first(args, run.agent),
        config=(tyro.conf.CascadeSubcommandArgs,),
        registry=_registry(trust),
    )


def as_run(options: Any) -> AnyRun:
    """The run without the options of the command."""
    kind = next(cls for cls in type(options).__mro__ if cls in typing.get_args(AnyRun))
    return kind(**{f.name: getattr(options, f.name) for f in dataclasses.fields(kind)})


def find_preset(name: str, trust: bool) -> AnyRun:
    """A preset by name, a `module:Class` agent, or the run of a run folder or config.json."""
    if name in PRESETS:
        return PRESETS[name]
    if Path(name).exists():
        return read_config(Path(name), trust)
    if ":" in name:
        return Run(agent=_user_agent(name, trust))
    if "/" in name or name.endswith(".json"):
        raise UserError(f"{name} does not exist: give a preset, a run folder or a config.json")
    raise UserError(f"there is no preset {name}; {suggest(name, PRESETS)}; `contraflow list presets` describes them")


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
                raise UserError(f"{word}: {type(owner).__name__} has no setting {name}; {suggest(name, hints)}")
            union = members(hints[name])
            kinds = [kebab(member.__name__) for member in union if isinstance(member, type)]
            if len(kinds) == len(union) and kind not in kinds:
                raise UserError(f"{word}: there is no kind {kind}; {suggest(kind, kinds)}")
    return words + [arg for arg in args if arg not in words]


def kebab(name: str) -> str:
    """MinVariance -> min-variance, RK4 -> rk4, NoneType -> none: the words of tyro."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name.removesuffix("Type")).lower()


def _registry(trust: bool) -> ConstructorRegistry:
    registry = ConstructorRegistry()

    @registry.primitive_rule
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

    return registry
