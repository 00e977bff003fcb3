"""Where noise enters the generation of a flow: the plans of the GRPO family, for one condition at a time.

Generation takes K steps of length h = 1 / K on the linear path. Outside of a window of w steps it follows the ODE.
Inside, a step is Gaussian, x_r ~ N(mean(x_t), std^2 I), so that it has a density and a policy gradient. Methods differ
in the noise of a step and in the place of the window:

    Flow-GRPO   all K steps                     MixGRPO   a window that moves from noise to data
    TempFlow    one step, several children      tree      each of w steps has several children

A field is called as field(x [d], t []) -> [d].
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int

from contraflow.core.optim import check_positive
from contraflow.core.types import PRNGKey
from contraflow.flow.kernel import posterior_std
from contraflow.flow.path import Linear, Scalar, Vector

Field = Callable[[Vector, Scalar], Vector]


@dataclass(frozen=True)
class FlowSDE:
    """The step of Euler and Maruyama with sigma = a sqrt((1 - t) / t) (2505.05470, eq. 9 to 12).

        mean = x + h [v + sigma^2 / (2 (1 - t)) (t v - x)],   std = sigma sqrt(h).

    The marginals are those of the ODE as h -> 0. a = 0 is the ODE and a = sqrt 2 the memoryless process of adjoint
    matching. At t = 0 the denominator of sigma^2 is h, as in the released code, and the first step multiplies the
    variance by 1 + a^4 / 4. The last step leaves the noise a sqrt(h^2 / (1 - h)) in the sample.
    """

    a: float = 0.7

    def __post_init__(self):
        check_positive(self, "a")

    def __call__(self, x: Vector, v: Vector, t: Scalar, h: float) -> tuple[Vector, Scalar]:
        square = self.a**2 * (1.0 - t) / jnp.maximum(t, h)
        return x + h * (v + square / (2.0 * (1.0 - t)) * (t * v - x)), jnp.sqrt(square * h)


@dataclass(frozen=True)
class Ancestral:
    """DDIM's step with noise eta (2010.02502, eq. 16) on the linear path; eta = 1 is DDPM.

        x_r = r x1 + sqrt((1 - r)^2 - std^2) x0 + std noise,   std = eta (1 - r) sqrt(1 - (t (1 - r) / (r (1 - t)))^2),

    with both ends as predicted at x_t. As h -> 0 this is `FlowSDE(sqrt(2) eta)`. It needs no guard at t = 0 and leaves
    no noise at t = 1, so its last step has no density.
    """

    eta: float = 1.0

    def __post_init__(self):
        if not 0 < self.eta <= 1:
            raise ValueError(f"eta must lie in (0, 1], got {self.eta}")

    def __call__(self, x: Vector, v: Vector, t: Scalar, h: float | Scalar) -> tuple[Vector, Scalar]:
        r = t + h
        std = self.eta * posterior_std(Linear(), t, r)
        rest = jnp.sqrt(jnp.maximum((1.0 - r) ** 2 - std**2, 0.0))
        return r * (x + (1.0 - t) * v) + rest * (x - t * v), std


@dataclass(frozen=True)
class CPS:
    """The step that preserves coefficients (2509.05952).

        x_r = r x1 + (1 - r) cos(pi eta / 2) x0 + (1 - r) sin(pi eta / 2) noise.

    It is exact where the data are one point. Otherwise it shrinks the distribution, because the predicted x0 varies
    less than x0 does, and it has no limit as h -> 0. Its last step has no density.
    """

    eta: float = 0.8

    def __post_init__(self):
        if not 0 < self.eta <= 1:
            raise ValueError(f"eta must lie in (0, 1], got {self.eta}")

    def __call__(self, x: Vector, v: Vector, t: Scalar, h: float) -> tuple[Vector, Scalar]:
        r, angle = t + h, 0.5 * jnp.pi * self.eta
        mean = r * (x + (1.0 - t) * v) + (1.0 - r) * jnp.cos(angle) * (x - t * v)
        return mean, (1.0 - r) * jnp.sin(angle)


Noise = FlowSDE | Ancestral | CPS


@dataclass(frozen=True)
class Plan:
    """K steps, and which of them are noisy. Raises ValueError for a window that does not fit into the steps."""

    steps: int = 10
    """K."""
    noise: Noise = FlowSDE()
    window: int | None = None
    """Noisy steps; None is every step that has a density."""
    branches: tuple[int, ...] = ()
    """Children of a state at each noisy step; () is one each."""
    place: Literal["first", "sweep", "random"] = "first"
    """Where the window begins: at t = 0; there at first, then later step by step; or at a random step each time."""
    every: int = 25
    """Iterations between two moves of a sweeping window."""
    shared: bool = False
    """All samples of a group begin with the same x_0."""
    deepen: float = 0.0
    """In a tree, the noise at depth j of w is multiplied by 1 + deepen (j + 1) / w."""
    compress: float | None = None
    """Share of the steps after the window that are taken, by a multistep solver of second order; None takes all."""

    def __post_init__(self):
        check_positive(self, "steps", "every")
        most = self.steps - (not isinstance(self.noise, FlowSDE))
        if not 1 <= self.noisy <= most:
            raise ValueError(f"window must lie between 1 and {most} for {self.steps} steps, got {self.window}")
        if self.branches and (len(self.branches) != self.noisy or min(self.branches) < 1):
            raise ValueError(f"branches needs a number of children for each of {self.noisy} noisy steps")
        if self.deepen < 0 or (self.compress is not None and not 0 < self.compress <= 1):
            raise ValueError(f"deepen must not be negative and compress lie in (0, 1]: {self.deepen}, {self.compress}")

    @property
    def h(self) -> float:
        return 1.0 / self.steps

    @property
    def noisy(self) -> int:
        """w."""
        return self.steps - (not isinstance(self.noise, FlowSDE)) if self.window is None else self.window

    @property
    def leaves(self) -> int:
        """Samples that grow from one x_0."""
        product = 1
        for children in self.branches:
            product *= children
        return product

    @property
    def starts(self) -> int:
        """Places at which the window may begin."""
        return self.steps - (not isinstance(self.noise, FlowSDE)) - self.noisy + 1

    def start(self, iteration: Int[Array, ""], key: PRNGKey) -> Int[Array, ""]:
        """Returns the first noisy step of an iteration."""
        if self.place == "sweep":
            return (iteration // self.every) % self.starts
        return jr.randint(key, (), 0, self.starts) if self.place == "random" else jnp.zeros((), jnp.int32)

    def step(self, field: Field, x: Vector, k: Int[Array, ""], scale: float | Scalar = 1.0) -> tuple[Vector, Scalar]:
        """Returns (mean [d], std []) of x_{k+1} given x_k, with the standard deviation multiplied by `scale`."""
        t = k * self.h
        mean, std = self.noise(x, field(x, t), t, self.h)
        return mean, scale * std

    def scales(self) -> Float[Array, " w"]:
        """Factors of the noise at the noisy steps."""
        return 1.0 + self.deepen * (1.0 + jnp.arange(self.noisy)) / self.noisy


class Noisy(eqx.Module):
    """The noisy steps of N samples, in the order of time."""

    x: Float[Array, "*N w d"]
    new: Float[Array, "*N w d"]
    mean: Float[Array, "*N w d"]
    std: Float[Array, "*N w"]
    k: Int[Array, "*N w"]


def generate(
    plan: Plan, field: Field, x0: Float[Array, "R d"], start: Int[Array, ""], key: PRNGKey
) -> tuple[Float[Array, "N d"], Noisy]:
    """Returns the ends [N, d] of N = R `plan.leaves` samples from the starts x0 [R, d], and their noisy steps.

    Leaves of one root follow each other. Steps that leaves share are evaluated once and returned for each.
    """
    h, w = plan.h, plan.noisy

    def euler(k, x):
        return x + h * jax.vmap(lambda x: field(x, k * h))(x)

    def noisy(x, k, scale, key):
        mean, std = jax.vmap(lambda x: plan.step(field, x, k, scale))(x)
        new = mean + std[:, None] * jr.normal(key, x.shape)
        return new, Noisy(x, new, mean, std, jnp.full(x.shape[0], k))

    x = jax.lax.fori_loop(0, start, euler, x0)
    keys, scales, ks = jr.split(key, w), plan.scales(), start + jnp.arange(w)
    if plan.branches:
        rows = []
        for j, children in enumerate(plan.branches):
            x, rows = jax.tree.map(partial(jnp.repeat, repeats=children, axis=0), (x, rows))
            x, row = noisy(x, ks[j], scales[j], keys[j])
            rows.append(row)
        steps = jax.tree.map(lambda *x: jnp.stack(x, 1), *rows)
    else:
        x, rows = jax.lax.scan(lambda x, inputs: noisy(x, *inputs), x, (ks, scales, keys))
        steps = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), rows)
    after = start + w
    if plan.compress is None:
        return jax.lax.fori_loop(after, plan.steps, euler, x), steps
    left = plan.steps - after
    n = jnp.where(left > 0, jnp.maximum(1, jnp.floor(plan.compress * left).astype(int)), 0)
    return multistep(field, x, after * h, n), steps


def multistep(field: Field, x: Float[Array, "N d"], t: Scalar, n: Int[Array, ""]) -> Float[Array, "N d"]:
    """Returns the ends of n equal steps from time t to 1 by DPM-Solver++(2M) (2211.01095), one evaluation each.

    With D the predicted x1, extrapolated from this step and the one before, and log-SNR / 2 growing by l in a step,
    x_r = (1 - r) / (1 - t) x_t + r (1 - exp(-l)) D. The first and the last step have no extrapolation.
    """
    h = (1.0 - t) / jnp.maximum(n, 1)

    def half_snr(t):
        return jnp.log(jnp.maximum(t, 1e-6)) - jnp.log(jnp.maximum(1.0 - t, 1e-6))

    def body(k, carry):
        x, before, length = carry
        now = t + k * h
        r = jnp.where(k == n - 1, 1.0, now + h)
        x1 = x + (1.0 - now) * jax.vmap(lambda x: field(x, now))(x)
        step = half_snr(r) - half_snr(now)
        push = jnp.where((k > 0) & (k < n - 1), 0.5 * step / length, 0.0)
        target = x1 + push * (x1 - before)
        left = (1.0 - r) / (1.0 - now)
        return left * x + (r - now) / (1.0 - now) * target, x1, step

    return jax.lax.fori_loop(0, n, body, (x, x, jnp.ones_like(h)))[0]
