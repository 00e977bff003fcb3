"""What is learned of targets whose best actions have several modes, from three starts, against exact answers.

    python benchmarks/modes.py run --methods rfm sac --targets two-modes/6     # docs/data/modes.csv, rows are added
    python benchmarks/modes.py time                                             # docs/data/modes_time.csv

The critic is fixed: Q / lambda is a log-density over actions in [-1, 1]^d whose modes, shares and widths are known.
Each method takes 3000 of its own updates (batch 256, network 2 x 64, learning rate 1e-3, temperature 1 where it has
one) from a fresh policy, from one cloned from samples of the first mode alone ("lacking"), and from one cloned from
samples of all modes in wrong shares, .95 and .05 for the rest together ("wrong"). Then 4000 actions of the policy are
drawn, without a choice among particles: as it is ("last"), and with its weights averaged over the last 1000 updates
("mean").

`time` is that of one update, beside `rfm` without jumps.
"""

import math
import time as clock
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import tyro
from common import DATA, Row, machine, read, write

from contraflow.agents import presets
from contraflow.agents.online.pmd import Selection
from contraflow.agents.online.rfm import RFM, Choice, PosteriorTarget
from contraflow.core.optim import Optim
from contraflow.core.types import Batch, EnvSpec
from contraflow.flow.matching import matching_error, square
from contraflow.flow.posterior.control import Fixed
from contraflow.flow.posterior.gibbs import Gibbs
from contraflow.flow.posterior.importance import Reverse
from contraflow.flow.posterior.markov import Markov
from contraflow.flow.posterior.proposal import Mixture, Noise
from contraflow.flow.solver import Midpoint
from contraflow.nets.critic import QEnsemble
from contraflow.nets.mlp import MLPSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.best_of import First
from contraflow.rl.critics import Critics
from contraflow.rl.temperature import Constant

STARTS = ("fresh", "lacking", "wrong")
UPDATES, BATCH, LAST, CLONE, DRAWS = 3000, 256, 1000, 2000, 4000
SWITCH = 2000
COLUMNS = (
    "method", "target", "start", "seed", "weights", "off", "along", "across", "share0", "share1", "share2", "share3",
)  # fmt: skip
NETWORK = ResidualMLP(64, 2, 16)
RATE = Optim(1e-3, max_grad_norm=10.0)


@dataclass(frozen=True)
class Modes:
    """A mixture of Gaussians over actions, each `along` wide on the diagonal and `across` wide in the rest."""

    centres: tuple[tuple[float, ...], ...]
    shares: tuple[float, ...]
    along: float
    across: float

    @property
    def dim(self) -> int:
        return len(self.centres[0])

    def log_density(self, a: jax.Array, shares: tuple[float, ...] | None = None) -> jax.Array:
        def one(centre):
            along = jnp.mean(a - centre) * math.sqrt(self.dim)
            across = jnp.sum((a - centre) ** 2) - along**2
            return -0.5 * (along / self.along) ** 2 - 0.5 * across / self.across**2

        logs = jax.vmap(one)(jnp.asarray(self.centres))
        return jax.nn.logsumexp(logs, b=jnp.asarray(shares or self.shares))

    def samples(self, key: jax.Array, n: int, shares: tuple[float, ...]) -> jax.Array:
        """Actions [n, d] of a policy that has the modes in these shares."""
        k_mode, k_normal, k_along = jr.split(key, 3)
        which = jr.categorical(k_mode, jnp.log(jnp.asarray(shares)), shape=(n,))
        x = self.across * jr.normal(k_normal, (n, self.dim))
        x = x - x.mean(1, keepdims=True) + self.along * jr.normal(k_along, (n, 1)) / math.sqrt(self.dim)
        return jnp.clip(jnp.asarray(self.centres)[which] + x, -0.98, 0.98)

    def measure(self, a: np.ndarray) -> Row:
        """Shares of the modes that lie nearest, and widths around them, over those of the exact distribution."""

        def widths(a):
            off = a[:, None] - np.asarray(self.centres)
            nearest = np.argmin((off**2).sum(-1), 1)
            off = off[np.arange(len(a)), nearest]
            along = off.mean(1) * math.sqrt(self.dim)
            across = np.sqrt(np.mean((off - off.mean(1, keepdims=True)) ** 2) * self.dim / max(self.dim - 1, 1))
            return np.bincount(nearest, minlength=len(self.centres)) / len(a), np.sqrt(np.mean(along**2)), across

        wide = np.asarray(self.samples(jr.key(1), 100_000, self.shares))
        exact, found = widths(wide[np.all(np.abs(wide) < 0.98, 1)]), widths(a)
        row = {f"share{i}": float(share) for i, share in enumerate(found[0])}
        worst = float(np.max(np.abs(found[0] - exact[0])))
        return row | {"off": worst, "along": float(found[1] / exact[1]), "across": float(found[2] / exact[2])}


@dataclass(frozen=True)
class Ring:
    """A ring of radius .6 and width .06 in the first two coordinates, Gaussians of width .1 in the others."""

    dim: int
    radius: float = 0.6
    width: float = 0.06
    shares: tuple[float, ...] = (0.25,) * 4  # of the quadrants

    def log_density(self, a: jax.Array, shares: Any = None) -> jax.Array:
        r = jnp.sqrt(jnp.sum(a[:2] ** 2) + 1e-12)
        return -0.5 * ((r - self.radius) / self.width) ** 2 - 0.5 * jnp.sum((a[2:] / 0.1) ** 2)

    def samples(self, key: jax.Array, n: int, shares: tuple[float, ...]) -> jax.Array:
        k_quarter, k_angle, k_radius, k_rest = jr.split(key, 4)
        which = jr.categorical(k_quarter, jnp.log(jnp.asarray(shares)), shape=(n,))
        angle = (which + jr.uniform(k_angle, (n,))) * jnp.pi / 2
        r = jr.choice(k_radius, jnp.linspace(0.2, 0.98, 2000), (n,), p=self._radial(jnp.linspace(0.2, 0.98, 2000)))
        rest = 0.1 * jr.normal(k_rest, (n, self.dim - 2))
        return jnp.concatenate([jnp.stack([r * jnp.cos(angle), r * jnp.sin(angle)], 1), rest], 1)

    def _radial(self, r: jax.Array) -> jax.Array:
        p = r * jnp.exp(-0.5 * ((r - self.radius) / self.width) ** 2)
        return p / p.sum()

    def measure(self, a: np.ndarray) -> Row:
        """Shares of the quadrants; the width of the ring over the exact one."""
        quarter = np.floor(np.arctan2(a[:, 1], a[:, 0]) / (np.pi / 2)).astype(int) % 4
        shares = np.bincount(quarter, minlength=4) / len(a)
        off = float(np.std(np.hypot(a[:, 0], a[:, 1])) / self.width)
        return {f"share{i}": float(s) for i, s in enumerate(shares)} | {
            "off": float(np.max(np.abs(shares - 0.25))), "along": float("nan"), "across": off
        }  # fmt: skip


def diagonal(d: int, shares: tuple[float, ...] = (0.665, 0.335)) -> Modes:
    return Modes(((0.5,) * d, (-0.5,) * d), shares, 0.25, 0.08)


def four(d: int) -> Modes:
    rest = (0.0,) * (d - 2)
    corners = ((0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5), (0.5, -0.5))
    return Modes(tuple(c + rest for c in corners), (0.4, 0.3, 0.2, 0.1), 0.1, 0.1)


TARGETS: dict[str, Modes | Ring] = {
    "two-modes/3": diagonal(3),
    "two-modes/6": diagonal(6),
    "two-modes/12": diagonal(12),
    "four-modes/6": four(6),
    "ring/6": Ring(6),
    "ridge/2": Modes(((0.0,) * 2,), (1.0,), 0.25, 0.05),
    "ridge/6": Modes(((0.0,) * 6,), (1.0,), 0.25, 0.05),
    "ridge/20": Modes(((0.0,) * 20,), (1.0,), 0.25, 0.05),
    "switch/6": diagonal(6, (0.2, 0.8)),
}
BEFORE = {"switch/6": (0.8, 0.2)}
"""The shares during the first 2000 updates, where they change."""


def rfm(target: PosteriorTarget, solver: Any = None) -> RFM:
    """The default of `rfm` with this target."""
    default = presets()["rfm"].agent
    flow = default.flow if solver is None else replace(default.flow, solver=solver)
    return replace(default, target=target, flow=flow)


def methods() -> dict[str, Any]:
    """Agents by name, as published but for what this file's head says of all."""
    named = {name: presets()[name].agent for name in ("rfm", "rfm-paper", "dpmd", "qvpo", "sdac", "dacer", "sac")}
    mixture = PosteriorTarget(Reverse(100, Mixture(), Fixed(0.0)))
    return named | {
        "rfm, no jumps": rfm(PosteriorTarget(Gibbs(5)), Midpoint(2)),
        "noise": rfm(PosteriorTarget(Reverse(100, Noise(), Fixed(0.0)))),
        "gradient": rfm(PosteriorTarget(Reverse(100, Noise(), Fixed(1.0)))),
        "mixture": rfm(mixture),
        "markov": rfm(PosteriorTarget(Markov())),
    }


def prepared(agent: Any) -> Any:
    """The agent with a small network, a critic that is only a place for the known one, and temperature 1."""
    agent = replace(agent, critic=Critics(width=1, depth=1, optim=Optim(1e-30)), optim=RATE)
    if hasattr(agent, "flow"):
        agent = replace(agent, flow=replace(agent.flow, network=NETWORK))
    else:
        agent = replace(agent, actor=MLPSpec(64, 2), alpha_optim=Optim(1e-30))  # alpha stays 1
    if isinstance(agent, RFM):
        agent = replace(agent, choose=Choice(First(), First(), First()), temperature=Constant(1.0))
        return replace(agent, condition_on_temperature=False)
    if hasattr(agent, "choose"):
        agent = replace(agent, choose=Selection(First(), First(), First()))
    return agent


class Known(QEnsemble):
    """Q / lambda of the target, with these shares."""

    target: Modes | Ring = eqx.field(static=True)
    shares: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, target: Modes | Ring, shares: tuple[float, ...]):
        super().__init__(2, 1, target.dim, 1, 1, key=jr.key(0))
        self.target, self.shares = target, shares

    def outputs(self, obs, action):
        return self.target.log_density(action, self.shares) * jnp.ones((self.num, 1))


def batch_of(n: int, key: jax.Array, dim: int) -> Batch:
    """n rows of one state whose episode ends, with uniform actions for methods that noise those of the buffer."""
    zeros, action = jnp.zeros((n, 1)), jr.uniform(key, (n, dim), minval=-1.0, maxval=1.0)
    return Batch(zeros, action, zeros[:, 0], jnp.zeros(n), zeros, jnp.ones((n, dim)))


def cloned(flow: Any, target: Modes | Ring, shares: tuple[float, ...], key: jax.Array) -> Any:
    """The flow after matching to samples of the target with these shares."""
    tx = optax.adam(optax.cosine_decay_schedule(2e-3, CLONE))

    def step(carry, key):
        """One step of matching: ((flow, state of the optimiser), None)."""
        flow, state = carry
        k_x, k_0, k_t = jr.split(key, 3)
        x1 = flow.spec.support.latent(target.samples(k_x, BATCH, shares))
        x0, t = jr.normal(k_0, x1.shape), jr.uniform(k_t, (BATCH,), minval=0.01, maxval=0.99)

        def loss(flow):
            cond = flow.encode(jnp.zeros(1))
            return jnp.mean(jax.vmap(lambda *row: square(matching_error(flow, cond, *row)))(x0, x1, t))

        updates, state = tx.update(eqx.filter_grad(loss)(flow), state)
        return (eqx.apply_updates(flow, updates), state), None

    return jax.lax.scan(step, (flow, tx.init(eqx.filter(flow, eqx.is_array))), jr.split(key, CLONE))[0][0]


def start_shares(target: Modes | Ring, start: str) -> tuple[float, ...]:
    n = len(target.shares)
    if start == "lacking":
        return (1.0,) + (0.0,) * (n - 1)
    return (0.95,) + (0.05 / (n - 1),) * (n - 1)


@partial(jax.jit, static_argnums=(0, 1, 2))
def learned(agent: Any, name: str, start: str, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Actions [4000, d] of the policy after all updates, and of its averaged weights."""
    target = TARGETS[name]
    k_init, k_clone, k_before, k_after, k_act = jr.split(key, 5)
    state = agent.init(k_init, EnvSpec(1, target.dim, 1, 1, True))
    if start != "fresh":
        flow = cloned(state.actor, target, start_shares(target, start), k_clone)
        state = replace(state, actor=flow)
        state = replace(state, slow=jax.tree.map(jnp.copy, flow)) if getattr(state, "slow", None) is not None else state

    def phase(state, mean, key, shares, updates, first):
        """`updates` of the agent from the `first` on, with the modes in these shares."""
        q = Known(target, shares)
        state = replace(state, critic=q, target=q)

        def step(carry, inputs):
            state, mean = carry
            key, i = inputs
            k_batch, k_update = jr.split(key)
            state, _ = agent.update(state, batch_of(BATCH, k_batch, target.dim), k_update)
            weight = 1.0 / jnp.maximum(1.0, i - (UPDATES - LAST) + 1.0)
            return (state, jax.tree.map(lambda a, b: a + weight * (b - a), mean, state.actor)), None

        return jax.lax.scan(step, (state, mean), (jr.split(key, updates), first + jnp.arange(updates)))[0]

    carry = (state, state.actor)
    early = SWITCH if name in BEFORE else 0
    if early:
        carry = phase(*carry, k_before, BEFORE[name], early, 0)
    state, mean = phase(*carry, k_after, target.shares, UPDATES - early, early)

    def act(actor):
        policy = agent.policy(replace(state, actor=actor))
        return jax.vmap(lambda key: policy(jnp.zeros(1), key, False))(jr.split(k_act, DRAWS))

    return act(state.actor), act(mean)


@dataclass(frozen=True)
class Options:
    command: tyro.conf.Positional[str]
    methods: tuple[str, ...] = tuple(methods())
    targets: tuple[str, ...] = ("two-modes/3", "two-modes/6", "four-modes/6", "ring/6", "ridge/6")
    starts: tuple[str, ...] = STARTS
    seeds: tuple[int, ...] = (0,)
    out: Path = DATA / "modes.csv"


def run(options: Options) -> None:
    """Every method on every target from every start; a row is written as it is found, and found rows are kept."""
    done = {(row["method"], row["target"], row["start"], row["seed"]) for row in read(options.out)}
    for seed in options.seeds:
        for name in options.targets:
            for method in options.methods:
                agent = prepared(methods()[method])
                starts = options.starts if len(TARGETS[name].shares) > 1 and name not in BEFORE else ("fresh",)
                starts = starts if hasattr(agent, "flow") else starts[:1]  # a Gaussian has one mode from any start
                for start in starts:
                    if (method, name, start, seed) in done:
                        continue
                    began = clock.monotonic()
                    found = learned(agent, name, start, jr.key(seed))
                    rows = [
                        {"method": method, "target": name, "start": start, "seed": seed, "weights": weights}
                        | TARGETS[name].measure(np.asarray(actions))
                        for weights, actions in zip(("last", "mean"), found, strict=True)
                    ]
                    write(options.out, [{c: row.get(c, "") for c in COLUMNS} for row in rows], COLUMNS, "a")
                    last, mean = rows
                    shares = " ".join(f"{mean[f'share{i}']:.3f}" for i in range(len(TARGETS[name].shares)))
                    widths = f"along {mean['along']:.2f} across {mean['across']:.2f}"
                    seconds = f"{clock.monotonic() - began:.0f} s"
                    print(
                        method,
                        name,
                        start,
                        "shares",
                        shares,
                        widths,
                        f"last off {last['off']:.3f}",
                        seconds,
                        flush=True,
                    )


def time(options: Options, rounds: int = 40) -> None:
    """Milliseconds of an update of each method, six dimensions, and the ratio to `rfm` without jumps in turn."""
    calls = {}
    for name in ("rfm, no jumps", *(m for m in options.methods if m != "rfm, no jumps")):
        agent, q = prepared(methods()[name]), Known(TARGETS["two-modes/6"], (0.665, 0.335))
        state = [
            replace(jax.jit(lambda k, a=agent: a.init(k, EnvSpec(1, 6, 1, 1, True)))(jr.key(0)), critic=q, target=q)
        ]
        step, rows = jax.jit(agent.update), batch_of(BATCH, jr.key(1), 6)

        def call(state=state, step=step, rows=rows):
            state[0] = jax.block_until_ready(step(state[0], rows, jr.key(2)))[0]

        call()
        calls[name] = call
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = clock.perf_counter()
            call()
            seconds[name].append(clock.perf_counter() - began)
    base = np.array(seconds["rfm, no jumps"])
    rows = [
        {"method": n, "ms": 1e3 * float(np.median(s)), "ratio": float(np.median(np.array(s) / base))}
        for n, s in seconds.items()
    ]
    for row in rows:
        print(f"{row['method']:14} {row['ms']:7.1f} ms  {row['ratio']:.2f}")
    write(DATA / "modes_time.csv", rows)


if __name__ == "__main__":
    options = tyro.cli(Options)
    print(machine())
    {"run": run, "time": time}[options.command](options)
