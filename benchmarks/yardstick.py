"""Bias and variance of posterior-mean estimators against exact answers, in dimensions 1 to 20.

    python benchmarks/yardstick.py errors        # docs/data/yardstick.csv
    python benchmarks/yardstick.py support       # docs/data/yardstick_support.csv

Target: `Separable.two_modes(d)`, whose posterior mean is exact in every dimension. For x_t drawn from the true path,
the velocity estimate (E[x1] - x_t) / (1 - t) is repeated with fresh candidates. All numbers are per dimension:

    bias^2 = mean over x_t of |average estimate - exact|^2 - variance / repeats,    variance = mean over x_t of Var,
    error  = max(bias^2, 0) + variance / 256.

What a network learns is the bias; the variance is averaged over the batch, here of 256. The term subtracted from bias^2
removes the part due to a finite number of repeats, so a bias of zero may come out slightly negative.

`support` asks the same of chains that start at a policy's endpoints, at 100 calls of the critic unless said. There
x_t lies on the path of the policy, a Gaussian over u: with the target's mean and deviation, but one mode where the
target has two in every coordinate ("made"), or far off and narrow ("adversarial"). Each repeat draws the endpoint from
the policy given x_t, and further endpoints whatever x_t.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import tyro
from common import DATA, Row, write

from contraflow.flow.path import Linear
from contraflow.flow.posterior.base import Posterior
from contraflow.flow.posterior.control import Fixed, MinVariance
from contraflow.flow.posterior.gibbs import Gibbs
from contraflow.flow.posterior.importance import Reverse
from contraflow.flow.posterior.markov import Markov
from contraflow.flow.posterior.proposal import Mixture, Noise, Ramp, UniformAction
from contraflow.flow.targets import Separable

TIMES = (0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95)
BATCH = 256


@dataclass(frozen=True)
class Constant:
    """E[u] whatever x_t: needs no call of the critic; an estimator worse than this has learned nothing."""

    def __call__(self, key, path, log_pi, x_t, t, support=None):
        return Posterior(log_pi.moments()[0], jnp.zeros_like(x_t), jnp.ones(()))


def estimators() -> dict:
    """Estimators by name; the number is K, calls of the critic."""
    table = {"official 100": Reverse(100, Noise(), MinVariance())}
    for k in (32, 100):
        table |= {
            f"noise {k}": Reverse(k, Noise(), Fixed(0)),
            f"gradient {k}": Reverse(k, Noise(), Fixed(1)),
            f"uniform {k}": Reverse(k, UniformAction(), Fixed(0)),
            f"mixture {k}": Reverse(k, Mixture((Noise(), UniformAction()), Ramp()), Fixed(0)),
        }
    return table | {"constant": Constant()}


@dataclass(frozen=True)
class GaussianPolicy:
    """u ~ N(mean_j, std_j^2): the law of the endpoints, here with a closed form given x_t."""

    name: str

    def moments(self, target):
        mean, std = target.moments()
        return (mean, std) if self.name == "made" else (jnp.full_like(mean, 2.0), jnp.full_like(std, 0.3))

    def sample(self, key, target, n: int):
        mean, std = self.moments(target)
        return mean[None] + std[None] * jr.normal(key, (n, mean.shape[0]))

    def support(self, key, target, path, x_t, t, n: int):
        """[n, d]: one draw given x_t, the others not."""
        k_first, k_others = jr.split(key)
        first = self.endpoint(k_first, target, path, x_t, t)
        return jnp.concatenate([first[None], self.sample(k_others, target, n - 1)])

    def endpoint(self, key, target, path, x_t, t):
        """One draw given x_t."""
        (mean, std), a, b = self.moments(target), path.alpha(t), path.beta(t)
        var = 1.0 / (1.0 / std**2 + (a / b) ** 2)
        return var * (mean / std**2 + a * x_t / b**2) + jnp.sqrt(var) * jr.normal(key, x_t.shape)


@partial(jax.jit, static_argnames=("estimator", "states", "repeats", "policy", "endpoints"))
def measure(estimator, target, t, key, states: int, repeats: int, policy: GaussianPolicy | None, endpoints: int):
    """(bias^2, variance, median ESS) of an estimator, per dimension of the velocity.

    Points x_t are those of the target's own path, or of `policy`'s, of which `endpoints` are the estimator's support.
    """
    k_x1, k_x0, k_repeat = jr.split(key, 3)
    path = Linear()
    x1 = target.sample(k_x1, states) if policy is None else policy.sample(k_x1, target, states)
    x_t = jax.vmap(path.perturb, (0, 0, None))(jr.normal(k_x0, x1.shape), x1, t)

    def estimate(key, x_t):
        if policy is None:
            return estimator(key, path, target, x_t, t)
        k_support, key = jr.split(key)
        return estimator(key, path, target, x_t, t, policy.support(k_support, target, path, x_t, t, endpoints))

    def one(x_t, key):
        exact = target.posterior_mean(path, x_t, t)
        out = jax.vmap(lambda k: estimate(k, x_t))(jr.split(key, repeats))
        scale = (1.0 - t) ** 2 * x_t.shape[0]
        variance = jnp.sum(out.mean.var(0, ddof=1)) / scale
        return jnp.sum((out.mean.mean(0) - exact) ** 2) / scale - variance / repeats, variance, out.ess

    # One x_t at a time: repeats x candidates already fill the processor.
    bias2, variance, ess = jax.lax.map(lambda args: one(*args), (x_t, jr.split(k_repeat, states)))
    return bias2.mean(), variance.mean(), jnp.median(ess)


def cases(d: int, policy: GaussianPolicy | None) -> dict[str, tuple[Any, int]]:
    """(estimator, endpoints) by name: without a policy those that need no endpoints; with one the rivals at 100 calls,
    and those that start at endpoints, of `Gibbs` one sweep within 100 calls and the default."""
    rivals = {name: (e, 1) for name, e in estimators().items()}
    if policy is None:
        return rivals
    mixture = Mixture((Noise(), UniformAction()), Ramp())
    rivals = {name: rival for name, rival in rivals.items() if name.split()[-1] in ("100", "constant")}
    return {name: rival for name, rival in rivals.items() if "mixture" not in name} | {
        "mixture 100": (Reverse(100, mixture, Fixed(0)), 1),
        "Markov, 1 x 4 steps, 21 calls": (Markov(), 1),
        "Markov, 8 x 2 steps, 47 calls": (Markov(16, mixture, (1.0,) * 2), 8),
        "Markov, 1 x 83 steps": (Markov(16, mixture, (1.0,) * 83), 1),
        "Markov, 8 x 8 steps, 95 calls": (Markov(16, mixture, (1.0,) * 8), 8),
        "Markov, 25 x 2 steps": (Markov(1, mixture, (1.0,) * 2), 25),
        **{f"Gibbs, {1 + d * (n - 1)} calls": (Gibbs(n), 1) for n in (1 + 99 // d, 5)},
    }


def main(
    table: Literal["errors", "support"],
    /,
    out: Path = DATA,
    dims: tuple[int, ...] = (1, 2, 6, 20),
    states: int = 32,
    repeats: int = 256,
    temperature: float = 0.2,
    seed: int = 0,
) -> None:
    """Print and write a table; of chains with the ratio to the best rival. `temperature` is that of the target: Q
    differs by about 1 between good and bad."""
    rows: list[Row] = []
    for policy in (None,) if table == "errors" else (GaussianPolicy("made"), GaussianPolicy("adversarial")):
        for d in dims:
            target = Separable.two_modes(d, temperature)
            best = [float("inf")] * len(TIMES)
            for name, (estimator, endpoints) in cases(d, policy).items():
                about: Row = {"d": d, "estimator": name}
                if policy is not None:
                    about = {"policy": policy.name} | about | {"endpoints": endpoints}
                cells = ""
                for i, t in enumerate(TIMES):
                    key = jr.key(seed + 1000 * d + i)
                    found = measure(estimator, target, jnp.asarray(t), key, states, repeats, policy, endpoints)
                    b, v, ess = map(float, found)
                    error = max(b, 0.0) + v / BATCH
                    best[i] = min(best[i], error) if name in estimators() else best[i]
                    numbers = {"bias2": b, "variance": v, "error": error, "ess": ess}
                    rows.append(about | {"t": t} | {k: float(f"{x:.4g}") for k, x in numbers.items()})
                    last = f"({ess:4.1f})" if policy is None else f"x{error / best[i]:<5.2g}"
                    cells += f"  {b:8.2g}/{v:<8.2g}{last}"
                print(f"{policy.name if policy else '':11} d={d:<2} {name:30} {cells}", flush=True)
    write(out / ("yardstick.csv" if table == "errors" else "yardstick_support.csv"), rows)


if __name__ == "__main__":
    tyro.cli(main)
