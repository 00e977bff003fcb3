"""All methods of alignment on two problems, at equal numbers of rewards and at equal time.

    python benchmarks/alignment.py pretrain                    # runs/align/PROBLEM, by `bc`
    python benchmarks/alignment.py train                       # docs/data/alignment.csv: a row for each evaluation
    python benchmarks/alignment.py table                       # at equal rewards, and at equal seconds

Pictures are drawn by alignment_pictures.py; memory, time and speed are measured by alignment_cost.py.

`mixture2d` has the reward `pair` and the exact answer p_ref exp(r / .5) / Z on a grid, with p_ref the density of the
pretrained flow itself. `digits` has the log-probability of the class; the judge is another classifier, and nearness to
the data. Five seeds of a method are one program; seconds are processor time of all five, divided by five, without
compilation. Networks have two blocks of 128 (mixture2d) and 256 (digits). `mean-flow-nft` begins with a flow of average
velocities of its own, with 4 steps, and its KL is to the tilt of that flow.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from common import DATA, Row, machine, read, write

from contraflow.agents import presets
from contraflow.agents.align.base import Pairs
from contraflow.core.types import EnvSpec
from contraflow.data.datasets.dataset import build
from contraflow.data.datasets.write import write as write_data
from contraflow.envs import make
from contraflow.envs.align.mixture import mixture
from contraflow.experiments.bridge import with_networks
from contraflow.flow.fewstep import Matching, MeanFlow
from contraflow.flow.grid import density, grid, relative_entropy, tilted, total_variation
from contraflow.flow.model import Ddim
from contraflow.flow.plan import FlowSDE, Plan
from contraflow.flow.solver import Midpoint
from contraflow.policy.artifact import load_policy, save_policy
from contraflow.policy.base import inner
from contraflow.presets import preset_run
from contraflow.rl.group import GroupAdvantage
from contraflow.training.loop import Carry, Learner, World
from contraflow.training.run import train
from contraflow.training.sources.conditions import Align

TEMPERATURE = 0.5


@dataclass(frozen=True)
class Case:
    """A problem, its reward, the size of its network and of its iterations, and the rewards spent."""

    reward: str
    width: int
    pretraining: int
    prompts: int
    group: int
    rewards: int


CASES = {
    "mixture2d": Case("pair", 128, 12000, 4, 32, 64_000),
    "digits": Case("classifier", 256, 1500, 10, 32, 48_000),
}
SEEDS, EVALUATIONS = 5, 6


def methods() -> dict[str, Any]:
    """The presets that need conditions. Those with the exact answer as their aim get its temperature; `flow-grpo-tilt`
    is Flow-GRPO with settings that have this aim too."""
    found = {name: preset.agent for name, preset in presets().items() if preset.needs == "conditions"}
    for name in ("adjoint-matching", "rfm-align"):
        found[name] = replace(found[name], temperature=TEMPERATURE)
    plan, raw = Plan(20, FlowSDE(2**0.5)), GroupAdvantage(std="none")
    tilt = replace(found["flow-grpo"], plan=plan, advantage=raw, kl=TEMPERATURE, kl_to_go=True)
    return found | {"flow-grpo-tilt": tilt}


@dataclass(frozen=True)
class Options:
    command: tyro.conf.Positional[str]
    problems: tuple[str, ...] = tuple(CASES)
    methods: tuple[str, ...] = ()
    runs: Path = Path("runs/align")
    out: Path = DATA / "alignment.csv"
    scale: float = 1.0
    """Multiplies the numbers of rewards."""


def world_of(name: str) -> World:
    env: Any = make(f"align:{name}/{CASES[name].reward}")
    cond, x = env.problem.data()
    return World(env.spec, env, Pairs(jnp.asarray(cond), jnp.asarray(x)))


KINDS: dict[str, Any] = {"": Matching(), "-average": MeanFlow()}  # of flows to begin with, by the end of their folder


def pretrain(options: Options) -> None:
    """Clones the data of each problem, with a plain flow and one of average velocities."""
    for name in options.problems:
        case = CASES[name]
        cond, x = world_of(name).env.problem.data()
        n = len(x)
        arrays = {"obs": cond, "action": x, "next_obs": cond, "reward": np.zeros(n), "terminated": np.ones(n, bool)}
        file = options.runs / f"{name}.npz"
        write_data(build(arrays | {"end": np.ones(n, bool)}, name=name, env=f"align:{name}", low=-1.0, high=1.0), file)
        for kind, objective in KINDS.items():
            if (folder := options.runs / f"{name}{kind}").exists():
                continue
            run = preset_run("bc")
            agent = with_networks(run.agent, {"width": case.width, "depth": 2})
            steps = replace(agent.flow, solver=Ddim(4 if objective.averaged else 10))
            optim = replace(agent.optim, lr=1e-3, decay_steps=case.pretraining)
            agent = replace(agent, flow=steps, optim=optim, objective=objective)
            source = replace(run.source, data=str(file), env=f"align:{name}/{case.reward}")
            many = {"steps": case.pretraining, "eval_every": case.pretraining, "eval_episodes": 1000, "trackers": ()}
            train(replace(run, agent=agent, source=source, **many), folder, quiet=True)


class Judge:
    """Measures a flow: reward, approval, and what is known exactly of its distribution."""

    def __init__(self, name: str, reference: Any, stats: Any):
        self.name, self.env, self.stats = name, world_of(name).env, stats
        self.planar = name == "mixture2d"
        if self.planar:
            self.on = grid()
            self.base = density(self.field(reference), self.on)
            reward = jax.vmap(lambda x: self.env.score(x, jnp.zeros(1)))(self.on.points)
            self.target = tilted(self.base, reward, TEMPERATURE)
            near = lambda m: jnp.sum((self.on.points - m[None]) ** 2, -1) < (3 * mixture().std[0]) ** 2
            self.modes = jax.vmap(near)(mixture().means)
        self.measure = jax.jit(self._measure)

    def frontier(self) -> list[Row]:
        """The largest reward for each divergence from the reference: tilts of many temperatures."""
        reward, rows = jax.vmap(lambda x: self.env.score(x, jnp.zeros(1)))(self.on.points), []
        for i, temperature in enumerate(np.geomspace(10.0, 0.01, 40)):
            mass = tilted(self.base, reward, float(temperature))
            moved = float(relative_entropy(mass, self.base))
            row = {"problem": self.name, "method": FRONTIER, "seed": 0, "rewards": i}
            rows.append(row | {"reward": float(mass @ reward), "moved": moved, "seconds": 0.0})
        return rows

    def field(self, flow: Any) -> Any:
        cond = jnp.zeros(1) if self.stats is None else self.stats(jnp.zeros(1))
        return lambda x, t: flow.velocity(x, t, cond)

    def _measure(self, flow: Any, key: Any) -> dict[str, Any]:
        k_cond, k_x = jr.split(key)
        cond = self.env.conditions(k_cond, 2000)
        seen = cond if self.stats is None else jax.vmap(self.stats)(cond)
        end = jax.vmap(lambda c, k: flow.particles(c, k, 1)[1][0])(seen, jr.split(k_x, 2000))
        x = jnp.clip(flow.action(end), -1, 1)
        out = {
            "reward": jnp.mean(jax.vmap(self.env.score)(x, cond)),
            "approved": jnp.mean(jax.vmap(self.env.problem.approved)(x, cond)),
        }
        if self.planar:
            mass = density(self.field(flow), self.on, Midpoint(12, power=1.5))
            share = self.modes @ mass / jnp.maximum(self.modes @ self.target, 1e-9)
            return out | {
                "kl": relative_entropy(mass, self.target), "tv": total_variation(mass, self.target),
                "moved": relative_entropy(mass, self.base), "modes": jnp.sum(share > 0.5),
            }  # fmt: skip
        # Of images: the spread within a class beside that of the data.
        spread = lambda x, c: jnp.mean(jnp.stack([jnp.sum(jnp.var(x, 0, where=(c == k)[:, None])) for k in range(10)]))
        labels, data = self.env.problem.data()
        ratio = spread(x, cond.argmax(-1)) / spread(jnp.asarray(data), jnp.asarray(labels).argmax(-1))
        return out | {"spread": ratio}


def run(options: Options) -> None:
    """Trains five seeds of each method side by side, and measures them as they go."""
    for name in options.problems:
        case, world = CASES[name], world_of(name)
        done = {row["method"] for row in read(options.out) if row["problem"] == name}
        wanted = {m: agent for m, agent in methods().items() if m not in done and m in (options.methods or methods())}
        for kind, objective in KINDS.items():
            mine = {m: agent for m, agent in wanted.items() if agent.flow.averaged == objective.averaged}
            if not mine:
                continue
            policy, spec, _ = load_policy(options.runs / f"{name}{kind}" / "policy")
            judge = Judge(name, inner(policy, "flow"), inner(policy, "stats"))
            if judge.planar and not kind and FRONTIER not in done:
                write(options.out, judge.frontier(), COLUMNS, mode="a")
            for method, agent in mine.items():
                agent = agent.starting_from(policy)
                rows, first = one(name, case, world, method, agent, policy, spec, judge, options.scale)
                write(options.out, rows, COLUMNS, mode="a")
                save_policy(options.runs / f"{name}-{method}", agent.policy(first), spec, f"align:{name}")
                last = [row for row in rows if row["rewards"] == rows[-1]["rewards"]]
                means = {k: round(float(np.mean([row[k] for row in last])), 3) for k in rows[-1] if k in MEASURES}
                print(f"{name:10} {method:18} {means}", flush=True)


MEASURES = ("reward", "approved", "kl", "tv", "moved", "modes", "spread", "seconds")
FRONTIER = "exact"
COLUMNS = ("problem", "method", "seed", "rewards", *MEASURES)


def one(
    name: str, case: Case, world: World, method: str, agent: Any, policy: Any, spec: EnvSpec, judge: Judge, scale: float
) -> tuple[list[Row], Any]:
    """The curve of one method, a row for each evaluation and seed, and the last state of the first seed."""
    group = case.group // getattr(agent, "leaves", 1) * getattr(agent, "leaves", 1)
    stage, each = Align(case.prompts, group), case.prompts * group
    between = max(1, round(scale * case.rewards / each / EVALUATIONS))

    def begin(key):
        state = agent.adopt(agent.init(key, spec), policy)
        zero = jnp.zeros((), jnp.int32)
        return Learner(state, None, jnp.zeros(1), zero, zero)

    @jax.jit
    def several(learners, keys):
        def body(learner, key):
            once = lambda _, x: stage.iterate(agent, world, Carry(x, None, None), key)[0].learner
            return jax.lax.fori_loop(0, between, once, learner)

        return jax.vmap(body)(learners, keys)

    keys = jax.vmap(jr.key)(jnp.arange(SEEDS))
    learners = jax.jit(jax.vmap(begin))(keys)
    compiled = several.lower(learners, keys).compile()
    rows, seconds = [], 0.0
    for i in range(EVALUATIONS + 1):
        if i:
            began = time.process_time()
            learners = jax.block_until_ready(compiled(learners, keys))
            seconds += (time.process_time() - began) / SEEDS
        for seed in range(SEEDS):
            flow = jax.tree.map(lambda x, s=seed: x[s], learners.agent.flow)
            found = {k: float(v) for k, v in judge.measure(flow, jr.key(100 + seed)).items()}
            rows.append(
                {"problem": name, "method": method, "seed": seed, "rewards": i * between * each}
                | found
                | {"seconds": seconds}
            )
    return rows, jax.tree.map(lambda x: x[0], learners.agent)


def table(options: Options) -> None:
    """Means over seeds and 95 % intervals, at the end and within the median of the methods' seconds."""
    rows = read(options.out)
    for name in options.problems:
        mine = [row for row in rows if row["problem"] == name and row["method"] != FRONTIER]
        if not mine:
            continue
        names = list(dict.fromkeys(row["method"] for row in mine))
        total = {m: max(row["seconds"] for row in mine if row["method"] == m) for m in names}
        limit = float(np.median(list(total.values())))
        columns = [c for c in MEASURES if any(row.get(c, "") != "" for row in mine)]
        within = f"the last evaluation within {limit:.1f} s"
        for title, most in (("equal rewards", max(total.values())), (within, limit)):
            print(f"\n{name}, {title}\n{'method':18}" + "".join(f"{c:>16}" for c in columns))
            for m in names:
                of = [row for row in mine if row["method"] == m]
                at = max(row["seconds"] for row in of if row["seconds"] <= most + 1e-9)
                last = [row for row in of if row["seconds"] == at]
                cells = []
                for c in columns:
                    values = np.array([row[c] for row in last], float)
                    half = 2.776 * values.std(ddof=1) / len(values) ** 0.5  # Student's t of five seeds
                    cells.append(f"{values.mean():9.3f} ±{half:5.3f}")
                print(f"{m:18}" + "".join(f"{cell:>16}" for cell in cells))


def main() -> None:
    options = tyro.cli(Options)
    print(machine())
    {"pretrain": pretrain, "train": run, "table": table}[options.command](options)


if __name__ == "__main__":
    main()
