"""Q-learning's two flows side by side: adjoint matching and Reverse Flow Matching on bandits of known answer.

    python benchmarks/prior.py            # docs/img/prior.png, and a table; two minutes of CPU

Behaviour p_b is a Gaussian or two of them in the plane, Q is quadratic, so p_b exp(Q) / Z is a mixture again and every
error exact. QAM (2601.14234) sees samples of p_b, which a flow clones, and the gradient of Q at the ends of its paths.
RFM (2601.08136) sees the density log p_b + Q, which a clone would not tell it, at 100 candidates for each x_t; its
gradient-expectation end is what QAM estimates too, from paths in place of weights (docs/methods/qam.md). Both begin
with the clone, and have the same network (2 x 64), 1000 updates and learning rate. One seed; each with 10 and with 30
Euler steps, in QAM those of its paths too.
"""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import tyro
from common import DATA, Row, machine

from contraflow.core.plotting import drawing
from contraflow.flow.adjoint import lean_adjoint, rollout
from contraflow.flow.matching import matching_error, square
from contraflow.flow.model import Flow
from contraflow.flow.solver import Euler
from contraflow.flow.targets import GaussianMixture
from contraflow.sampling.methods import METHODS
from contraflow.sampling.trainer import NOTHING, Trainer, draw, field, start

UPDATES, BATCH, DRAWS, VIEW, CELLS = 1000, 64, 20_000, 3.0, 24
TRAINER = Trainer(steps=UPDATES, batch=BATCH)
RFM = {"RFM": "rfm", "RFM, gradient": "idem", "RFM, mixture": "mixture"}
INK, DOT = "#1b2a41", "#d55e00"


class Bandit:
    """Behaviour, Q(a) = -|a - goal|^2 / (2 width^2), and behaviour tilted by exp(Q)."""

    def __init__(self, name: str, means: Any, std: float, weights: Any, goal: Any, width: float):
        self.name, self.goal, self.width = name, jnp.asarray(goal), width
        means, weights = np.asarray(means, float), np.asarray(weights, float)
        self.behaviour = GaussianMixture(means, std, weights)
        precision = 1 / std**2 + 1 / width**2
        moved = (means / std**2 + np.asarray(goal) / width**2) / precision
        shares = weights * np.exp(-0.5 * ((means - goal) ** 2).sum(1) / (std**2 + width**2))
        self.exact = GaussianMixture(moved, precision**-0.5, shares)

    def q(self, a: jax.Array) -> jax.Array:
        return -0.5 * jnp.sum((a - self.goal) ** 2) / self.width**2

    def log_pi(self, a: jax.Array) -> jax.Array:
        return self.behaviour(a) + self.q(a)


BANDITS = (
    Bandit("one mode", [[-0.6, -0.3]], 0.7, [1.0], [1.0, 0.6], 0.8),
    Bandit("two modes", [[-1.2, 0.0], [1.2, 0.0]], 0.45, [0.8, 0.2], [0.7, 0.6], 1.0),
)


def descend(loss: Any, flow: Any, key: jax.Array) -> Any:
    """The flow after all updates by the optimiser of `Trainer`."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(3e-3, UPDATES)))

    def step(carry, key):
        flow, state = carry
        updates, state = tx.update(jax.grad(loss)(flow, key), state)
        return (optax.apply_updates(flow, updates), state), None

    return jax.lax.scan(step, (flow, tx.init(flow)), jr.split(key, UPDATES))[0][0]


def clone(bandit: Bandit, flow: Flow, key: jax.Array) -> Flow:
    """Flow matching to samples of the behaviour."""

    def loss(flow, key):
        k_x, k_0, k_t = jr.split(key, 3)
        x1, t = bandit.behaviour.sample(k_x, BATCH), jr.uniform(k_t, (BATCH,), minval=0.001, maxval=0.999)
        return jnp.mean(
            jax.vmap(lambda *row: square(matching_error(flow, NOTHING, *row)))(flow.noise(k_0, BATCH), x1, t)
        )

    return descend(loss, flow, key)


def qam(bandit: Bandit, base: Flow, steps: int, key: jax.Array) -> Flow:
    """Adjoint matching of a flow that begins as the base."""

    def loss(fine, key):
        def one(x0, key):
            path = jax.lax.stop_gradient(rollout(field(fine), field(base), x0, steps, key))
            found = lean_adjoint(field(base), path, -jax.grad(bandit.q)(path[-1]))
            return jnp.mean(found.error(found.control(field(fine))) ** 2)

        k_start, k_paths = jr.split(key)
        return jnp.mean(jax.vmap(one)(base.noise(k_start, BATCH), jr.split(k_paths, BATCH)))

    return descend(loss, base, key)


def rfm(bandit: Bandit, base: Flow, name: str, key: jax.Array) -> Flow:
    """The trainer of `contraflow sample` from the clone on."""
    published: Any = METHODS[name]
    # Estimates are projected into the box [-4, 4]^2: where few candidates have all the weight they may be anything.
    trainer = replace(published, method=replace(published.method, bounded=True), steps=UPDATES, batch=BATCH)
    state = jax.tree.map(lambda x: x[0], start(trainer, key[None]))
    state = replace(state, flow=base)
    round_ = jax.jit(partial(trainer.method.round, trainer, bandit.log_pi, trainer.every))
    for i in range(UPDATES // trainer.every):
        state, _ = round_(state, jr.fold_in(key, i))
    return state.flow


def shares(a: np.ndarray) -> np.ndarray:
    return np.histogram2d(a[:, 0], a[:, 1], CELLS, [(-VIEW, VIEW)] * 2)[0] / len(a)


def errors(bandit: Bandit, a: jax.Array) -> Row:
    """Mean and std of each coordinate less the exact ones, and half the sum of |share - probability| over the cells."""
    exact, fine = bandit.exact, 10 * CELLS
    line = jnp.asarray((np.arange(fine) + 0.5) / fine * 2 * VIEW - VIEW)
    grid = jnp.stack(jnp.meshgrid(line, line, indexing="ij"), -1)
    p = np.exp(np.asarray(jax.vmap(jax.vmap(exact))(grid))).reshape(CELLS, 10, CELLS, 10).sum((1, 3))
    p /= p.sum()
    w = np.exp(np.asarray(exact.log_weights))
    mean = w @ np.asarray(exact.means)
    std = np.sqrt(w @ (np.asarray(exact.means) ** 2 + np.asarray(exact.std)[:, None] ** 2) - mean**2)
    x = np.asarray(a)
    off, wide = np.abs(x.mean(0) - mean).max(), x.std(0) / std
    return {
        "mean": float(off),
        "std": " ".join(f"{x:.2f}" for x in wide),
        "tv": 0.5 * float(np.abs(shares(x) - p).sum()),
    }


def table() -> tuple[list[Row], dict[tuple[str, str], jax.Array]]:
    """A row for each bandit and method, and samples by both."""
    rows, samples = [], {}
    for number, bandit in enumerate(BANDITS):
        k_init, k_clone, k_learn, k_draw = jr.split(jr.key(number), 4)
        base = jax.jit(lambda k, b=bandit, i=k_init: clone(b, TRAINER.flow.init(i, 2, 0), k))(k_clone)
        flows = {("clone", n): (lambda b=base: b) for n in (10, 30)}
        flows |= {
            ("QAM", n): partial(jax.jit(lambda k, n=n, b=bandit, f=base: qam(b, f, n, k)), k_learn) for n in (10, 30)
        }
        learned = {name: partial(rfm, bandit, base, method, k_learn) for name, method in RFM.items()}
        done: dict[str, Any] = {}

        def once(name, learned=learned, done=done):
            if name not in done:
                done[name] = learned[name]()
            return done[name]

        flows |= {(name, n): partial(once, name) for name in RFM for n in (10, 30)}
        exact = errors(bandit, bandit.exact.sample(k_draw, DRAWS))
        rows.append({"bandit": bandit.name, "method": "exact draws", "steps": "-"} | exact | {"seconds": 0.0})
        for (name, steps), make in flows.items():
            begin = time.process_time()
            flow = jax.block_until_ready(make())
            seconds = time.process_time() - begin
            a = draw(TRAINER, flow, Euler(steps), k_draw, DRAWS)
            samples[bandit.name, f"{name}, {steps}"] = a
            row = {"bandit": bandit.name, "method": name, "steps": steps} | errors(bandit, a)
            rows.append(row | {"seconds": seconds})
            print(rows[-1], flush=True)
    return rows, samples


def picture(file: Path, samples: dict[tuple[str, str], jax.Array]) -> None:
    """Samples [n, 2] by (task, method) over contours of the exact density, as docs/img/prior.png."""
    columns = ("clone, 30", "QAM, 10", "QAM, 30", "RFM, mixture, 30")
    titles = ("clone of behaviour", "QAM, 10 steps", "QAM, 30 steps", "RFM, 30 steps")
    file.parent.mkdir(parents=True, exist_ok=True)
    with drawing(file, 8.6, 3.75) as figure:
        axes = figure.subplots(len(BANDITS), len(columns), sharex=True, sharey=True)
        line = jnp.linspace(-2.4, 2.4, 240)
        grid = jnp.stack(jnp.meshgrid(line, line), -1)
        for row, bandit in zip(axes, BANDITS, strict=True):
            tilted, before = (np.exp(np.asarray(jax.vmap(jax.vmap(f))(grid))) for f in (bandit.exact, bandit.behaviour))
            for axis, name, title in zip(row, columns, titles, strict=True):
                density, colour = (before, "#7a869a") if name.startswith("clone") else (tilted, "#0072b2")
                dots = np.asarray(samples[bandit.name, name])[:1200]
                axis.plot(*dots.T, ".", ms=2.4, mew=0, color=DOT, alpha=0.6, rasterized=True)
                levels = density.max() * np.array([0.05, 0.25, 0.6, 0.9])
                axis.contour(line, line, density, levels=levels, colors=colour, linewidths=1.1)
                axis.plot(*bandit.goal, "*", ms=9, mfc="white", mec=INK, mew=0.8)
                axis.set(xlim=(-2.4, 2.4), ylim=(-1.7, 1.9), xticks=(), yticks=(), aspect="equal")
                if bandit is BANDITS[0]:
                    axis.set_title(title, fontsize=10, color=INK)
            row[0].set_ylabel(bandit.name, fontsize=10, color=INK)


def main(image: Path = DATA.parent / "img" / "prior.png") -> None:
    """Train, print the table, write the picture."""
    rows, samples = table()
    print(machine())
    print(f"{'bandit':10s} {'method':14s} {'steps':>5s} {'off':>6s} {'std / exact':>12s} {'TV':>6s} {'s':>5s}")
    for row in rows:
        print(
            f"{row['bandit']:10s} {row['method']:14s} {row['steps']!s:>5s} {row['mean']:6.3f} {row['std']:>12s} "
            f"{row['tv']:6.3f} {row['seconds']:5.1f}"
        )
    picture(image, samples)


if __name__ == "__main__":
    tyro.cli(main)
