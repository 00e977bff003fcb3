"""Speed: of an update, an action and whole loops, each beside a peer in the same run; what every preset costs.

    python benchmarks/speed.py [update act loop sac ppo seeds environments family] [--peer module:function]

`--peer` names a function `(case, **sizes) -> {name: callable}` of a module on PYTHONPATH, implementations at the same
settings that are kept outside this repository; {} for a case that it does not know. Cases are timed in turn: medians,
and medians of paired ratios. On a shared machine take `--clock cpu`, the process's own time, and NPROC=1, one thread.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from common import DATA, machine, peer, write
from timing import paired, report

from contraflow.agents import presets
from contraflow.core.types import Batch, EnvSpec
from contraflow.data.samplers import Uniform
from contraflow.envs import close, make
from contraflow.experiments.bridge import with_networks
from contraflow.policy.base import act_batch
from contraflow.policy.best_of import First
from contraflow.training.loop import Carry, World, epoch, stacked
from contraflow.training.sources import base, replay, rollouts

OBS, ACT, BATCH = 17, 6, 256
SPEC = EnvSpec(OBS, ACT, 1, 1000, False)
STEPS, TASKS = 500, ("rfm-cartpole", "rfm-walker")  # TASKS: presets made for one
Case = Callable[[], object]
Cases = dict[str, Case]
agent_of = lambda name: presets()[name].agent


def sized(agent: Any, width: int) -> Any:
    """The agent with all networks of two layers of that width."""
    critic = replace(agent.critic, width=width, depth=2)
    return with_networks(agent, {"width": width, "depth": 2, "critic": critic})


def batch(key: jax.Array, rows: int = BATCH) -> Batch:
    k = jr.split(key, 4)
    action = jr.uniform(k[1], (rows, ACT), minval=-1.0)
    obs, following = jr.normal(k[0], (rows, OBS)), jr.normal(k[3], (rows, OBS))
    return Batch(obs, action, jr.uniform(k[2], (rows,)), jnp.full(rows, 0.99), following, jnp.ones_like(action))


def updater(agent: Any, rows: int = BATCH) -> Case:
    """One jitted, donated update per call, as a training loop without fusion would make it."""
    state = [jax.jit(lambda k: agent.init(k, SPEC))(jr.key(0))]
    data, key = batch(jr.key(1), rows), jr.key(2)
    step = jax.jit(agent.update, donate_argnums=0)

    def call() -> object:
        state[0], metrics = step(state[0], data, key)
        return metrics

    return call


def actor(agent: Any, greedy: bool) -> Case:
    """One action for one observation, dispatch included."""
    policy = agent.policy(jax.jit(lambda k: agent.init(k, SPEC))(jr.key(0)))
    obs, key, counter = np.zeros((1, OBS), np.float32), jr.key(2), iter(range(10**9))
    return lambda: np.asarray(act_batch(policy, obs, key, next(counter), greedy))


def started(agent: Any, env: Any, source: Any, keys: Any, buffer_size: int = 0) -> Carry:
    """Carries of fresh learners [S] on an environment in JAX, or of the one seed of a host environment."""
    made = [
        Carry(base.first_learner(agent, env.spec, jr.split(key)[0], buffer_size), *env.reset(jr.split(key)[1]))
        for key in keys
    ]
    carry = stacked(made) if env.spec.jittable else made[0]
    return carry if source is None else epoch(source, agent, World(env.spec, env), carry, keys, BATCH + 50)[0]


def looping(stage: Any, agent: Any, env: Any, carry: Carry, keys: Any, n: int) -> Case:
    """n iterations of a loop per call."""
    kept, world = [carry], World(env.spec, env)

    def call() -> None:
        kept[0], _, error = epoch(stage, agent, world, kept[0], keys, n)
        if error is not None:
            raise error

    return call


def update_cases(other: str | None, clock: Any) -> None:
    print("\none update at the official settings: batch 256, 32 particles, 10 Euler steps, K 100, width 256")
    cases = {"rfm-paper": updater(agent_of("rfm-paper"))} | peer(other, "update", obs=OBS, act=ACT, rows=BATCH)
    cases |= {f"{name}, its own": updater(agent_of(name)) for name in ("rfm", "sac")}
    report(paired(cases, 9, clock=clock), list(cases)[1] if other else "rfm-paper")


def act_cases(other: str | None, clock: Any) -> None:
    print("\none action for one observation, 10 Euler steps, width 256; dispatch included")
    paper = agent_of("rfm-paper")
    one = replace(paper, choose=replace(paper.choose, explore=First()))
    cases = {"rfm-paper, softmax of 32": actor(paper, False)} | peer(other, "act", obs=OBS, act=ACT)
    cases["rfm-paper, 1 particle"] = actor(one, False)
    report(paired(cases, 61, inner=5, clock=clock), list(cases)[1] if other else "rfm-paper, softmax of 32")


def loop_cases(other: str | None, clock: Any) -> None:
    """The host loop beside the sum of its three parts, each timed alone."""
    print("\nthe host loop against the sum of its parts, envpool:CheetahRun-v1, 8 environments, 8 updates")
    env, keys, n = make("envpool:CheetahRun-v1", 8, 0), jr.key(0)[None], 40
    for name in ("sac", "rfm"):
        agent = agent_of(name)
        stage = replay.Interact(False, 8, 256, Uniform(agent.gamma))
        carry = started(agent, env, replace(stage, random=True, updates=0), keys, 100_000)
        world, rounds = World(env.spec, env), []
        for _ in range(8):
            start = clock()
            carry, _, _ = epoch(stage, agent, world, carry, keys, n)
            loop, learner, obs = clock() - start, carry.learner, carry.obs
            policy, start, action = agent.policy(learner.agent), clock(), np.zeros(0)
            for _ in range(n):
                action = np.asarray(replay.decide(policy, env.spec, obs, learner.iteration, keys[0]))
            act, start = clock() - start, clock()
            for _ in range(n - 1):
                env.step(carry.env, action)
            env_state, step = env.step(carry.env, action)
            physics, start = clock() - start, clock()
            for _ in range(n):
                learner, _ = replay.learn(stage, agent, learner, None, obs, action, step, keys[0])
                jax.block_until_ready(learner.steps)
            rounds.append((loop, act, physics, clock() - start))
            carry = Carry(learner, env_state, step.obs)
        rounds = np.array(rounds[1:])  # the first compiles
        whole, act, physics, update = np.median(rounds, 0) / n * 1e3
        over = np.median(rounds[:, 0] / rounds[:, 1:].sum(1) - 1)
        parts = f"act {act:.2f} + env {physics:.2f} + learn {update:.2f}"
        print(f"{name:20s} loop {whole:7.2f} ms = {parts} {100 * over:+.1f} %   ({8 / whole * 1e3:.0f} env steps/s)")
    close(env)


def sac_cases(other: str | None, clock: Any) -> None:
    print(f"\n{STEPS} steps of SAC's loop on gym:HalfCheetah-v5, one update each, width 256, batch 256")
    env, agent, keys = make("gym:HalfCheetah-v5", 1, 0), agent_of("sac"), jr.key(0)[None]
    stage = replay.Interact(False, 1, BATCH, Uniform(agent.gamma))
    carry = started(agent, env, replace(stage, random=True, updates=0), keys, 100_000)
    cases = {"ours": looping(stage, agent, env, carry, keys, STEPS)} | peer(other, "sac", steps=STEPS, rows=BATCH)
    for name, seconds, _ in report(paired(cases, 9, clock=clock), list(cases)[-1], "s"):
        print(f"{name:20s} {STEPS / seconds:.0f} steps/s")
    close(env)


def ppo_cases(other: str | None, clock: Any) -> None:
    """A rollout and its update, on two simulators."""
    copies, unroll, keys = 16, 125, jr.key(0)[None]
    print(f"\nPPO on Hopper-v5: rollouts of {copies} x {unroll}, 10 epochs of 16 minibatches, width 64")
    agent = replace(agent_of("ppo"), ppo=replace(agent_of("ppo").ppo, epochs=10, minibatches=16))
    cases = {}
    for name, id in {"ours, Gymnasium": "gym:Hopper-v5", "ours, EnvPool": "envpool:Hopper-v5"}.items():
        env = make(id, copies, 0)
        cases[name] = looping(rollouts.Unroll(unroll), agent, env, started(agent, env, None, keys), keys, 1)
    cases |= peer(other, "ppo", copies=copies, unroll=unroll, epochs=10, minibatches=16, width=64)
    for name, seconds, _ in report(paired(cases, 9, clock=clock), list(cases)[-1], "s"):
        print(f"{name:20s} {copies * unroll / seconds:.0f} steps/s")


def seeds_cases(clock: Any, seeds: int, name: str, env_id: str, width: int) -> None:
    """Many seeds in one compiled program, against one seed and against as many single runs in turn."""
    agent, env, n = sized(agent_of(name), width), make(env_id, 1), 400
    print(f"\n{n} iterations of {name}'s loop on {env_id}, width {width}, one update of 64 each")
    stage = replay.Interact(False, 1, 64, Uniform(agent.gamma))
    warm_up, keys = replace(stage, random=True, updates=0), jr.split(jr.key(0), seeds)
    one = [looping(stage, agent, env, started(agent, env, warm_up, k[None], 10_000), k[None], n) for k in keys]
    cases: Cases = {
        "one seed": one[0],
        f"{seeds} seeds at once": looping(stage, agent, env, started(agent, env, warm_up, keys, 10_000), keys, n),
        f"{seeds} single runs in turn": lambda: [call() for call in one],
    }
    report(paired(cases, 5, clock=clock), "one seed", "s")


def environment_cases(other: str | None, clock: Any) -> None:
    """One task in three simulators, random actions drawn before; the first two as one compiled scan."""
    for copies in (1, 32, 256):
        print(f"\n{STEPS} steps of {copies} copies of dm_control's cartpole swingup")
        actions = jr.uniform(jr.key(1), (STEPS, copies, 1), minval=-1.0, maxval=1.0)
        cases: Cases = {}
        for id in ("playground:CartpoleSwingup", "jax:cartpole-swingup", "envpool:CartpoleSwingup-v1"):
            env = make(id, copies)
            state, _ = (jax.jit(env.reset) if env.spec.jittable else env.reset)(jr.key(0))
            if env.spec.jittable:
                body = lambda s, a, env=env: (lambda out: (out[0], out[1].reward.sum() + out[1].obs.sum()))(
                    env.step(s, a)
                )
                cases[id] = partial(jax.jit(lambda s, a, body=body: jax.lax.scan(body, s, a)[1]), state, actions)
            else:
                cases[id] = lambda env=env, s=state, host=np.asarray(actions): [env.step(s, a) for a in host][-1][1]
        for name, ms, _ in report(paired(cases, 5, clock=clock), "envpool:CartpoleSwingup-v1"):
            print(f"    {name}: {copies * STEPS / ms * 1e3:,.0f} steps/s")


def products(jaxpr: Any) -> int:
    """2 m k n over all matrix products of a program, loops as often as they run; nothing else is counted."""
    total = 0
    for equation in jaxpr.eqns:
        inner = [x for p in equation.params.values() for x in (p if isinstance(p, tuple | list) else [p])]
        inside = sum(products(getattr(x, "jaxpr", x)) for x in inner if hasattr(getattr(x, "jaxpr", x), "eqns"))
        if equation.primitive.name == "while" and inside:
            raise ValueError("matrix products in a loop of unknown length cannot be counted")
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        total += inside * (equation.params["length"] if equation.primitive.name == "scan" else 1)
    return total


def family_cases(other: str | None, clock: Any, rows: int = 128, width: int = 64) -> None:
    """What an update and an action of every off-policy preset cost at common sizes, each otherwise its own."""
    found = {name: p.agent for name, p in presets().items() if p.needs == "replay" and name not in TASKS}
    chosen = {name: sized(agent, width) for name, agent in found.items()}
    updates = {name: updater(agent, rows) for name, agent in chosen.items()}
    acts = {name: actor(agent, True) for name, agent in chosen.items()}
    for name, calls in peer(other, "family", obs=OBS, act=ACT, width=width, depth=2, rows=rows).items():
        updates[f"peer {name}"], acts[f"peer {name}"] = calls
    update_times, act_times = paired(updates, 7, 3, clock), paired(acts, 7, 50, clock)
    table = []
    for name in updates:
        row: dict[str, Any] = {"agent": name}
        if (agent := chosen.get(name)) is not None:
            state = jax.eval_shape(lambda k, agent=agent: agent.init(k, SPEC), jr.key(0))
            program = jax.make_jaxpr(agent.update)(state, batch(jr.key(1), rows), jr.key(2)).jaxpr
            row["megaflop_per_row"] = round(products(program) / rows / 1e6, 3)
        row["ms_per_update"] = round(1e3 * median(update_times[name]), 2)
        row["us_per_action"] = round(1e6 * median(act_times[name]), 1)
        table.append(row)
        print(*row.values(), sep="\t", flush=True)
    write(DATA / "family.csv", table)


CASES = {
    "update": update_cases, "act": act_cases, "loop": loop_cases, "sac": sac_cases, "ppo": ppo_cases,
    "environments": environment_cases, "family": family_cases,
}  # fmt: skip


def main(
    what: tuple[str, ...] = (*CASES, "seeds"), /, peer: str | None = None, clock: Literal["wall", "cpu"] = "wall",
    seeds: int = 8, agent: str = "sac", env: str = "jax:pendulum", width: int = 32,
) -> None:  # fmt: skip
    """Print the tables of `what`; the last four settings are those of `seeds`."""
    if unknown := set(what) - {*CASES, "seeds"}:
        raise SystemExit(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}, seeds")
    print(machine())
    ticks = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
    for name in what:
        if name == "seeds":
            seeds_cases(ticks, seeds, agent, env, width)
        else:
            CASES[name](peer, ticks)


if __name__ == "__main__":
    tyro.cli(main)
