"""`contraflow align`: pretrains a flow on the data of a problem, and aligns it with rewards."""

import shlex
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, cast

import jax.random as jr
import numpy as np
import tyro

from contraflow.agents import presets
from contraflow.cli import data, train
from contraflow.cli.evaluate import summary
from contraflow.cli.flags import read_flags
from contraflow.core.settings import suggest
from contraflow.core.trust import Trust
from contraflow.core.types import UserError
from contraflow.data.datasets.readers import load as load_dataset
from contraflow.envs import align, make
from contraflow.policy.artifact import load_policy, policy_folder
from contraflow.policy.base import ablations
from contraflow.policy.best_of import ONE
from contraflow.runtime.policy import load
from contraflow.training import gallery
from contraflow.training.evaluate import evaluate_one, margin
from contraflow.training.run import Run, check_new, read_config
from contraflow.training.sources import Conditions
from contraflow.training.sources.critic import PREFIX as CRITIC

HELP = """\
usage: contraflow align pretrain PROBLEM --out DIR
       contraflow align METHOD --model DIR [--problem NAME] [--reward NAME ...] [--weights W ...] [--out DIR] ...
       contraflow align METHOD --model DIR --reward critic:DIR [--data SET] [--env ID] ...

The first trains a flow on the data of a problem, the second aligns a flow with rewards. METHOD is one of these, a run
folder or its config.json, or your own as module:Class (with --trust MODULE):

{methods}

--model is the folder of a run or a policy, and --problem is its own unless given: {problems}.
--reward names rewards of the problem, functions module:function of your own (with --trust MODULE), or models as
onnx:FILE; several are summed with --weights.

The third aligns a policy with the advantages of a critic, that of the policy in DIR. Data and environment are those of
the model's run unless given.
All other flags are those of `contraflow train`; `contraflow align METHOD --help` lists them."""

INSTEAD = {"--model": "--pretrained", "--problem": "--env"}
SAMPLES = 500  # of the closing table

PRETRAIN = {
    "mixture2d": "--steps 4000 --eval-every 2000 --agent.flow.network.width 64 --agent.flow.network.depth 2",
    "digits": "--steps 1000 --agent.flow.network.width 256 --agent.flow.network.depth 2",
    "glyphs": "--steps 6000 --eval-every 3000 --eval-episodes 100",
}
"""Flags of `bc` by problem. After these the judge approves of about as many samples as of the data."""
COMMON = "--agent.optim.lr 1e-3 --eval-episodes 500 --eval-every 500"


@dataclass(frozen=True)
class Pretrain:
    """Train a flow on the data of a problem with `bc`. Other flags are those of `contraflow train bc`."""

    problem: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROBLEM")]
    """The problem; `contraflow list envs align:` shows them."""
    out: Path
    """Folder of the new run; its data are written beside it, as DIR-data.npz."""


def align_command(args: list[str]) -> int:
    """Runs `contraflow align`: the exit code of `contraflow train`."""
    methods = {p.name: p.title for p in presets().values() if p.needs == "conditions"}
    if not args or args[0] in ("-h", "--help", "--help-all"):
        rows = "\n".join(f"  {name:<20} {title}" for name, title in methods.items())
        print(HELP.format(methods=rows, problems=", ".join(align.PROBLEMS)))
        return 0
    method, *flags = args
    if method == "pretrain":
        return _pretrain(flags)
    if method.startswith("-"):
        raise UserError(f"the method comes first: contraflow align METHOD {method} ...; {suggest('', methods)}")
    if method in presets() and method not in methods:
        need = f"{method} learns from a {presets()[method].needs}, not from rewards of its samples"
        raise UserError(f"{need}: use `contraflow train {method}`, or one of {', '.join(methods)}")
    return train.train_command([method, *translated(method, flags)])


def translated(method: str, flags: list[str]) -> list[str]:
    """Returns the flags of `train`: --model as --pretrained, --problem NAME as --env align:NAME.

    Without a problem it is that of the model. Raises UserError without a model, or for one trained on something else.
    """
    if {"-h", "--help", "--help-all"} & set(flags):
        print("--model DIR stands for --pretrained DIR, and --problem NAME for --env align:NAME.\n")
        return flags
    words = [word for flag in flags for word in (_split(flag) if flag.startswith("--") else [flag])]
    found = {flag: words[i + 1] for i, flag in enumerate(words[:-1]) if flag in ("--model", "--pretrained")}
    if Path(method).exists() and not found:
        return flags
    if not found:
        raise UserError(
            "a model is missing: give --model DIR; `contraflow align pretrain PROBLEM --out DIR` trains one"
        )
    model = Path(*found.values())
    if any(word.startswith(CRITIC) for word in words):
        return [INSTEAD.get(word, word) for word in words] + _of_run(model, words)
    if not {"--problem", "--env"} & set(words):
        folder = policy_folder(model)
        env = load_policy(folder)[2]
        if not env.startswith(align.PREFIX):
            names = ", ".join(align.PROBLEMS)
            raise UserError(
                f"{folder} was not trained on a problem of alignment: give --problem NAME ({names}), or --reward "
                "critic:DIR to align its actions"
            )
        words += ["--problem", env]
    for i, word in enumerate(words[:-1]):
        if word == "--problem":
            words[i + 1] = align.PREFIX + words[i + 1].removeprefix(align.PREFIX)
    return [INSTEAD.get(word, word) for word in words]


def _of_run(model: Path, words: list[str]) -> list[str]:
    """Flags for the data and the environment of a policy, where they are not given: those of its run."""
    more = []
    if "--env" not in words:
        more += ["--env", load_policy(policy_folder(model))[2]]
    if "--data" not in words:
        known = (model / "config.json").is_file() and model != policy_folder(model)
        data = getattr(read_config(model).source, "data", "") if known else ""
        if not data:
            raise UserError(f"{model} names no data: give --data, whose observations the actions are for")
        more += ["--data", data]
    return more


def _split(flag: str) -> list[str]:
    name, equals, value = flag.partition("=")
    return [name, value] if equals else [name]


def _pretrain(args: list[str]) -> int:
    """Writes the data of a problem and trains `bc` on them."""
    if not args or {"-h", "--help", "--help-all"} & set(args):
        read_flags(Pretrain, ["--help"], prog="contraflow align pretrain")
    if args[0].startswith("-"):
        raise UserError("the problem comes first: contraflow align pretrain PROBLEM --out DIR")
    name, *flags = args
    name = name.removeprefix(align.PREFIX)
    words = [word for flag in flags for word in (_split(flag) if flag.startswith("--") else [flag])]
    if "--out" not in words[:-1]:
        raise UserError(f"a folder is missing: contraflow align pretrain {name} --out DIR")
    align.find(name)
    out = Path(words[words.index("--out") + 1])
    check_new(out)
    file = out.with_name(f"{out.name}-data.npz")
    if not file.exists():
        data.make_command([f"{align.PREFIX}{name}", "--out", str(file)])
    elif load_dataset(str(file)).env != align.PREFIX + name:
        raise UserError(f"{file} holds other data than those of {name}: choose another --out")
    usual = f"{COMMON} {PRETRAIN.get(name.partition('/')[0], '')}".split()
    settings = {flag: value for flag, value in zip(usual[::2], usual[1::2], strict=True) if flag not in words}
    return train.train_command(["bc", "--data", str(file), *chain(*settings.items()), *words])


# the closing report of runs on problems of alignment


def report(folder: Path, run: Run, require: float | None, trust: Trust) -> int:
    """Prints rewards and judgements of a run's policies and draws their samples; returns 1 below `require`."""
    source: Any = run.source
    aligned = isinstance(source, Conditions)
    policies = {"best": load(folder / "best", trust=trust).network, "last": load(folder, trust=trust).network}
    if aligned and run.pretrained and policy_folder(Path(run.pretrained)).is_dir():
        policies = {"before": load_policy(policy_folder(Path(run.pretrained)), trust)[0]} | policies
    if aligned and source.data:
        return _actions(run, policies, require, trust)
    env: Any = source.generation(run.seed, trust) if aligned else make(run.env, trust=trust)
    k_cond, k_draw, k_show = jr.split(jr.key(12_345), 3)
    names = source.reward if aligned and len(env.rewards) > 1 else ()
    with closing(env):
        cond, means = env.conditions(k_cond, SAMPLES), {}
        print(f"{'':8}{'reward':<20}{'judge approves':<16}{'  '.join(names)}".rstrip())
        for name, policy in policies.items():
            x = gallery.samples(policy, cond, k_draw)
            each = env.each_of(x, cond)
            total, good = each @ np.asarray(env.weights), float(np.mean(env.good(x, cond)))
            means[name] = float(total.mean())
            mean = f"{total.mean():.4g} +- {margin(total):.2g}"
            own = "  ".join(f"{value:<{len(n)}.4g}" for n, value in zip(names, each.mean(0), strict=False))
            print(f"{name:8}{mean:<20}{f'{good:.1%}':<16}{own}".rstrip())
    shown, file = {"samples": policies["last"]}, folder / "samples.png"
    if "before" in policies:
        shown, file = {"before": policies["before"], "after": policies["last"]}, folder / "before_after.png"
    print(f"best policy  {folder / 'best'}\nlast policy  {folder / 'policy'}\ncurve        {folder / 'curve.png'}")
    if gallery.draw(env.problem, shown, file, k_show):
        print(f"samples      {file}")
    if not aligned:
        print(f"next         contraflow align nft --model {shlex.quote(str(folder))}")
    if require is None or means["best"] >= require:
        return 0
    print(f"{means['best']:.4g} is below the bar of {require:g}: try another --seed or more --steps")
    return 1


def _actions(run: Run, policies: dict[str, Any], require: float | None, trust: Trust) -> int:
    """Prints rewards and returns of policies; returns 1 if the best one's mean return is below `require`.

    A model that chooses among the actions of its flow is shown with and without this choice: the flow is what changes.
    """
    k_cond, k_draw, k_play = jr.split(jr.key(12_345), 3)
    if ONE in (parts := ablations(policies.get("before"))):
        policies = {"before": parts[ONE], "chosen": policies["before"]} | {k: policies[k] for k in ("best", "last")}
    with closing(run.source.open(run, trust)) as opened:
        env, played, returns = opened.world.env, cast(Any, opened.evaluation), {}
        cond = env.conditions(k_cond, SAMPLES)
        print(f"{'':8}{'reward':<20}return in {run.env}")
        for name, policy in policies.items():
            total = env.each_of(gallery.samples(policy, cond, k_draw), cond) @ np.asarray(env.weights)
            returns[name] = evaluate_one(policy, played, k_play, run.eval_episodes)
            mean = f"{total.mean():.4g} +- {margin(total):.2g}"
            print(f"{name:8}{mean:<20}{summary(returns[name])}")
    if require is None or returns["best"].returns.mean() >= require:
        return 0
    print(f"{returns['best'].returns.mean():.4g} is below the bar of {require:g}: try another --seed or more --steps")
    return 1
