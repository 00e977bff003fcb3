"""Speed of one update, one action and the whole host loop, each against a peer in the same run.

    python benchmarks/speed.py [update act network loop sac] [--peer module:function]

`--peer` names a function `(obs_dim, act_dim) -> {"update": callable, "act": callable, "sac": callable}` (any of them)
of a module on PYTHONPATH: an implementation at the same settings, kept outside this repository. `sac` takes SAC_STEPS
steps of the whole loop. Medians of paired rounds; one line per case.
"""

import dataclasses
import importlib
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from timing import paired, report

from contraflow import AGENTS, EnvSpec, Transition
from contraflow.agents.base import Agent, acting_state
from contraflow.policy.select import First, Softmax
from contraflow.presets import RFM_PAPER
from contraflow.training.evaluate import act_batch

OBS, ACT, BATCH = 17, 6, 256
SAC_STEPS = 500
SPEC = EnvSpec(OBS, ACT, 1, 1000, False)


def batch(key: jax.Array, rows: int = BATCH) -> Transition:
    k = jr.split(key, 4)
    false = jnp.zeros(rows, bool)
    return Transition(
        jr.normal(k[0], (rows, OBS)), jr.uniform(k[1], (rows, ACT), minval=-1.0), jr.uniform(k[2], (rows,)),
        jr.normal(k[3], (rows, OBS)), false, false, jnp.ones(rows, int),
    )  # fmt: skip


def updater(agent: Agent, rows: int = BATCH) -> Callable[[], object]:
    """One jitted, donated update per call, as a training loop without fusion would make it."""
    state = [jax.jit(lambda k: agent.init(k, SPEC))(jr.key(0))]
    data, key = batch(jr.key(1), rows), jr.key(2)
    step = jax.jit(agent.update, donate_argnums=0)

    def call() -> object:
        state[0], metrics = step(state[0], data, key)
        return metrics

    return call


def actor(agent: Agent, explore: bool) -> Callable[[], object]:
    state = acting_state(agent, jax.jit(lambda k: agent.init(k, SPEC))(jr.key(0)))
    obs, key = np.zeros((1, OBS), np.float32), jr.key(2)
    counter = iter(range(10**9))
    return lambda: np.asarray(act_batch(agent, state, obs, key, next(counter), explore))


def update_cases(peer: dict[str, Callable[[], object]]) -> None:
    """One update at the official settings, beside the peer and our other agents."""
    print(
        "\none RFM update, official settings (obs 17, act 6, batch 256, 32 particles, 10 Euler steps, K 100, width 256)"
    )
    cases = {"ours rfm-paper": updater(RFM_PAPER)}
    if "update" in peer:
        cases["peer"] = peer["update"]
    cases["ours rfm (default)"] = updater(AGENTS["rfm"]())
    cases["ours sac"] = updater(AGENTS["sac"]())
    report(paired(cases, rounds=9), "peer" if "update" in peer else "ours rfm-paper")


def act_cases(peer: dict[str, Callable[[], object]]) -> None:
    """One action at the official settings, beside the peer and with one particle."""
    print("\none action for one observation, 32 particles, 10 Euler steps, width 256; dispatch included")
    one = dataclasses.replace(RFM_PAPER, explore=First())
    cases = {"ours, softmax of 32": actor(RFM_PAPER, True)}
    if "act" in peer:
        cases["peer, softmax of 32"] = peer["act"]
    cases["ours, 1 particle"] = actor(one, True)
    against = "peer, softmax of 32" if "act" in peer else "ours, softmax of 32"
    report(paired(cases, rounds=61, inner=5), against)


def loop_cases() -> None:
    """Seconds of the host loop beside the sum of its three parts, each timed alone."""
    from contraflow.envs import make
    from contraflow.training.loop import Carry, epoch
    from contraflow.training.offpolicy import OffPolicy, decide, first_learner, learn

    print("\nthe host loop against the sum of its parts, envpool:CheetahRun-v1, 8 environments, 8 updates")
    env = make("envpool:CheetahRun-v1", 8, 0)
    for name, agent in {
        "sac": AGENTS["sac"](),
        "rfm (default)": AGENTS["rfm"](),
        "rfm, 4 particles": dataclasses.replace(AGENTS["rfm"](), backup=Softmax(4), explore=Softmax(4)),
    }.items():
        phase, key = OffPolicy(False, 8, 256), jr.key(0)
        learner = jax.jit(lambda k, a=agent: first_learner(a, env.spec, 100_000, k))(key)
        carry = Carry(learner, *env.reset(key))
        carry, _, _ = epoch(phase, agent, env, carry, key, 20)
        rounds, n = [], 40
        for _ in range(7):
            start = time.perf_counter()
            carry, _, _ = epoch(phase, agent, env, carry, key, n)
            loop = time.perf_counter() - start
            learner, obs = carry.learner, carry.obs
            start = time.perf_counter()
            state = acting_state(agent, learner.agent)
            for _ in range(n):
                action = np.asarray(decide(phase, agent, env.spec, state, obs, learner.iteration, key))
            act = time.perf_counter() - start
            action = np.zeros((env.spec.num_envs, env.spec.action_dim), np.float32)
            start = time.perf_counter()
            for _ in range(n - 1):
                env.step(carry.env, action)
            env_state, step = env.step(carry.env, action)
            physics = time.perf_counter() - start
            start = time.perf_counter()
            for _ in range(n):
                learner, _ = learn(phase, agent, learner, obs, action, step, key)
                jax.block_until_ready(learner.steps)
            update = time.perf_counter() - start
            carry = Carry(learner, env_state, step.obs)
            rounds.append((loop, act, physics, update))
        loop, act, physics, update = np.median(np.array(rounds), 0) / n * 1e3
        over = np.median([r[0] / sum(r[1:]) - 1 for r in rounds])
        print(
            f"{name:20s} loop {loop:7.2f} ms = act {act:.2f} + env {physics:.2f} + learn {update:.2f} "
            f"{100 * over:+.1f} %   ({8 / loop * 1e3:.0f} env steps/s)"
        )


def sac_cases(peer: dict[str, Callable[[], object]]) -> None:
    """The whole loop of SAC: one environment, one update per step, width 256, batch 256."""
    from contraflow.envs import make
    from contraflow.training.loop import Carry, epoch
    from contraflow.training.offpolicy import OffPolicy, first_learner

    print(f"\n{SAC_STEPS} steps of SAC's loop on gym:HalfCheetah-v5, one update each, width 256, batch 256")
    env, agent, key = make("gym:HalfCheetah-v5", 1, 0), AGENTS["sac"](), jr.key(0)
    learner = jax.jit(lambda k: first_learner(agent, env.spec, 100_000, k))(key)
    state = [epoch(OffPolicy(True, 0, BATCH), agent, env, Carry(learner, *env.reset(key)), key, 400)[0]]

    def call() -> None:
        state[0], _, _ = epoch(OffPolicy(False, 1, BATCH), agent, env, state[0], key, SAC_STEPS)

    cases: dict[str, Callable[[], object]] = {"ours": call}
    if "sac" in peer:
        cases["peer"] = peer["sac"]
    for name, median, _ in report(paired(cases, rounds=9), "peer" if "sac" in peer else "ours", "s"):
        print(f"{name:20s} {SAC_STEPS / median:.0f} steps/s")


def network_cases() -> None:
    """Equinox against Flax Linen: the same field, one regression step on 25600 samples and one jitted call."""
    import equinox as eqx
    import flax.linen as nn
    import optax

    from contraflow.nets.layers import time_embedding
    from contraflow.nets.velocity import Velocity

    class LinenVelocity(nn.Module):
        @nn.compact
        def __call__(self, x, t, cond):
            h = nn.Dense(256)(x) + nn.Dense(256)(time_embedding(t, 128)) + nn.Dense(256)(cond)
            h = nn.gelu(h)
            for _ in range(2):
                h = h + nn.gelu(nn.Dense(256)(h))
            return nn.Dense(ACT)(h)

    print("\nEquinox against Linen, the same velocity field")
    k = jr.split(jr.key(0), 4)
    x, t, cond = jr.normal(k[0], (25_600, ACT)), jr.uniform(k[1], (25_600,)), jr.normal(k[2], (25_600, OBS))
    ours = Velocity(ACT, OBS, 256, 2, key=k[3])
    linen = LinenVelocity()
    params = linen.init(k[3], x[0], t[0], cond[0])
    tx = optax.adam(3e-4)

    def step_of(field):
        def step(net, opt, x, t, cond):
            loss = lambda net: jnp.mean(jax.vmap(lambda x, t, c: field(net, x, t, c))(x, t, cond) ** 2)
            grad = jax.grad(loss)(net)
            updates, opt = tx.update(grad, opt, net)
            return eqx.apply_updates(net, updates), opt

        return step

    def train_call(field, net):
        start = time.perf_counter()
        step = jax.jit(step_of(field)).lower(net, tx.init(net), x, t, cond).compile()
        print(f"  compile {time.perf_counter() - start:.2f} s")
        return lambda: step(net, tx.init(net), x, t, cond)

    def linen_field(p, x, t, c):
        return linen.apply(p, x, t, c)

    def ours_field(v, x, t, c):
        return v(x, t, c)

    cases = {"linen update": train_call(linen_field, params), "equinox update": train_call(ours_field, ours)}
    report(paired(cases, rounds=9), "linen update")
    calls = {
        "linen dispatch": lambda f=jax.jit(linen_field): f(params, x[0], t[0], cond[0]),
        "equinox dispatch": lambda f=jax.jit(ours_field): f(ours, x[0], t[0], cond[0]),
    }
    report(paired(calls, rounds=41, inner=50), "linen dispatch", "us")


def main(what: tuple[str, ...] = ("update", "act", "network", "loop", "sac"), /, peer: str | None = None) -> None:
    """Print the tables of `what`: update, act, network, loop, sac."""
    print(f"jax {jax.__version__}, {jax.devices()[0].platform}, {sys.version.split()[0]}")
    cases: dict[str, Callable[[], object]] = {}
    if peer is not None:
        module, _, name = peer.partition(":")
        cases = getattr(importlib.import_module(module), name)(OBS, ACT)
    if "update" in what:
        update_cases(cases)
    if "act" in what:
        act_cases(cases)
    if "network" in what:
        network_cases()
    if "loop" in what:
        loop_cases()
    if "sac" in what:
        sac_cases(cases)


if __name__ == "__main__":
    tyro.cli(main)
