"""Adjoint matching (arXiv 2409.08861): a flow tilted by exp(-g(x_1)), from gradients of g at the end alone.

A base field v_b has ends of density p_b. Adjoint matching learns a field v with ends of density p_b(x) exp(-g(x)) / Z.
With g = -tau Q this is a policy close to behaviour (QAM, 2601.14234), with g = -reward / lambda a fine-tuned generative
flow. On the linear path x_t = t x1 + (1 - t) x0 the process

    dx = (2 v_b(x, t) - x / t + sigma u) dt + sigma dW,   sigma^2 = 2 (1 - t) / t,   u = 2 (v - v_b) / sigma,

has the ends of the field v, and is memoryless: x_1 does not depend on x_0. The control u that minimises the relative
entropy of paths plus g, E[int |u|^2 / 2 + g(x_1)], therefore makes exactly that tilt. At the optimum u = -sigma
E[a | x_t] with the lean adjoint a, which depends on the base alone:

    da/dt = -(2 dv_b/dx - 1 / t)^T a,   a_1 = grad g(x_1),   so that   v = v_b - sigma^2 / 2 E[a_t | x_t].

In K steps of h = 1 / K at t_i = i h, `rollout` takes x_{i+1} = x_i + h (2 v - x_i / (t_i + h)) + sqrt(h) sigma_i noise
with sigma_i^2 = 2 (1 - t_i + h) / (t_i + h). Its last step is x + h v_b without noise. `lean_adjoint` is the exact
derivative of these steps along the base. The control of step i is matched to the adjoint after it, a_{i+1}, which makes
the expectation of sum_i h |u_i|^2 / 2 + g(x_K) stationary for any K.

A running cost f adds int f(x_t, t) dt to the cost and -grad f to da/dt. Given x_1 the controlled states are then no
longer those of the noising process, so the ends of the ODE of v are not the ends of the process: sample with its noise.

The released code (QAM, and TRQAM after it) evaluates the base at t_i in the roll-out and at t_i + h in the adjoint,
treats the last step as one of the process and matches u_i to a_i. These three deviations nearly cancel: between
Gaussians its mean is the closer one in 10 steps with a small tau, and off by twice as much from 50 steps on
(tests/flow/test_flow_adjoint.py has both). It draws x_0 and the noises from one key.

All functions take one sample. A field is called as field(x [d], t []) -> [d].
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from contraflow.core.types import PRNGKey
from contraflow.flow import kernel
from contraflow.flow.path import Scalar, Vector

Field = Callable[[Vector, Scalar], Vector]
Running = Callable[[Vector, Scalar], Scalar]
"""A cost f(x_t, t) for each unit of time."""


def sigma(t: Float[Array, "*n"], h: float = 0.0) -> Float[Array, "*n"]:
    """Returns sqrt(2 (1 - t + h) / (t + h)), the memoryless noise at time t for steps of length h."""
    return jnp.sqrt(2.0 * (1.0 - t + h) / (t + h))


def memoryless(field: Field, steps: int) -> kernel.Kernel:
    """Returns the process as a kernel (mean, std) of step k. The field is evaluated at the beginning of a step."""
    h = 1.0 / steps

    def step(x, k):
        t = k * h
        mean = x + h * (2.0 * field(x, t) - x / (t + h))
        return mean, jnp.full_like(x, jnp.sqrt(h) * sigma(t, h))

    return step


def rollout(fine: Field, base: Field, x0: Vector, steps: int, key: PRNGKey) -> Float[Array, "n d"]:
    """Returns x_0 ... x_K, [K + 1, d], under the field `fine`; the last step is one of the base, without noise.

    `key` draws the noises. Draw x_0 ~ N(0, I) from another key.
    """
    xs = kernel.rollout(memoryless(fine, steps), x0, steps - 1, key)
    last = xs[-1]
    end = last + base(last, jnp.asarray(1.0 - 1.0 / steps, last.dtype)) / steps
    return jnp.concatenate([xs, end[None]])


class Targets(eqx.Module):
    """The states of a roll-out and the targets there, one row for each of its K steps."""

    x: Float[Array, "K d"]
    t: Float[Array, " K"]
    base: Float[Array, "K d"]
    """v_b(x_i, t_i)."""
    adjoint: Float[Array, "K d"]
    """a_{i+1}."""

    @property
    def sigma(self) -> Float[Array, " K"]:
        return sigma(self.t, 1.0 / self.t.shape[0])

    @property
    def velocity(self) -> Float[Array, "K d"]:
        """v_b - sigma^2 / 2 a, with the tilted field as its conditional mean given x_i."""
        return self.base - 0.5 * self.sigma[:, None] ** 2 * self.adjoint

    def control(self, field: Field) -> Float[Array, "K d"]:
        """Returns u_i = 2 (v - v_b) / sigma_i of a field v."""
        return 2.0 / self.sigma[:, None] * (jax.vmap(field)(self.x, self.t) - self.base)

    def error(self, control: Float[Array, "K d"]) -> Float[Array, "K d"]:
        """Returns u_i + sigma_i a_{i+1}. The loss is its mean square; at the optimum its mean given x_i is 0."""
        return control + self.sigma[:, None] * self.adjoint


def lean_adjoint(base: Field, xs: Float[Array, "n d"], slope: Vector, running: Running | None = None) -> Targets:
    """Returns the targets of a roll-out xs [K + 1, d], with `slope` = grad g(x_K) and any running cost,
    sum_i h f(x_i, t_i).

    The caller decides what g sees of x_K. With g = Q(clip(x)), `slope` and the adjoint at the end are 0 in coordinates
    outside the box. Nothing pulls them back, because the clipped action would not change. This is the tilt of the
    actions that are carried out, as in the released code.
    """
    steps = xs.shape[0] - 1
    h = 1.0 / steps

    def back(a, inputs):
        x, k = inputs
        t = k * h
        v, transposed = jax.vjp(lambda x: base(x, t), x)
        (pulled,) = transposed(a)
        # The last step is x + h v_b. All others have twice the velocity and a pull to the origin.
        last = k == steps - 1
        before = a + h * jnp.where(last, pulled, 2.0 * pulled - a / (t + h))
        if running is not None:
            before = before + h * jax.grad(running)(x, t)
        return before, (v, a)

    k = jnp.arange(steps, dtype=xs.dtype)
    _, (v, after) = jax.lax.scan(back, slope, (xs[:-1], k), reverse=True)
    return Targets(xs[:-1], k * h, v, after)


def path_kl(control: Float[Array, "K d"]) -> Scalar:
    """Returns sum_i h |u_i|^2 / 2, in nats. Its mean over roll-outs is the relative entropy of paths to the base's.

    It is an upper bound on that of the ends. At the optimum both are equal up to the error of finite steps.
    """
    return 0.5 * jnp.sum(control**2) / control.shape[0]
