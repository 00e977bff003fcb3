"""Adjoint matching (arXiv 2409.08861): a flow tilted by exp(-g(x_1)), from gradients of g at the end alone.

A base field v_b has the ends p_b. Sought is the field v whose ends have the density p_b(x) exp(-g(x)) / Z: for
g = -tau Q a policy close to behaviour (QAM, 2601.14234), for g = -reward / lambda a generative flow that is fine-tuned.
On the linear path x_t = t x1 + (1 - t) x0 the process

    dx = (2 v_b(x, t) - x / t + sigma u) dt + sigma dW,   sigma^2 = 2 (1 - t) / t,   u = 2 (v - v_b) / sigma,

has the ends of the field v, and is memoryless: x_1 does not depend on x_0. So the control u of least E[int |u|^2 / 2
+ g(x_1)], which is the relative entropy of paths and g, makes exactly that tilt. At the optimum u = -sigma E[a | x_t]
with the lean adjoint a, which only sees the base:

    da/dt = -(2 dv_b/dx - 1 / t)^T a,   a_1 = grad g(x_1),   so that   v = v_b - sigma^2 / 2 E[a_t | x_t].

Discrete, with K steps of h = 1 / K at t_i = i h: `rollout` takes x_{i+1} = x_i + h (2 v - x_i / (t_i + h)) + sqrt(h)
sigma_i noise with sigma_i^2 = 2 (1 - t_i + h) / (t_i + h), and its last step x + h v_b without noise. `lean_adjoint`
is the exact derivative of these steps along the base, and the control of step i is matched to the adjoint behind it,
a_{i+1}: what makes the expectation of sum_i h |u_i|^2 / 2 + g(x_K) stationary, for any K. The released code (QAM, and
TRQAM after it) evaluates the base at t_i in the roll-out and at t_i + h in the adjoint, takes the last step for one of
the process and matches u_i to a_i, three deviations that nearly cancel: between Gaussians its mean is the closer one in
10 steps with a small tau, and off by twice as much from 50 steps on (tests/flow/test_flow_adjoint.py has both). It
draws x_0 and the noises from one key.

All functions take one sample; fields are called as field(x [d], t []) -> [d].
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


def sigma(t: Float[Array, "*n"], h: float = 0.0) -> Float[Array, "*n"]:
    """sqrt(2 (1 - t + h) / (t + h)): the memoryless noise at time t, of steps of length h."""
    return jnp.sqrt(2.0 * (1.0 - t + h) / (t + h))


def memoryless(field: Field, steps: int) -> kernel.Kernel:
    """The process as a kernel (mean, std) of step k; the field is asked at the time at which a step begins."""
    h = 1.0 / steps

    def step(x, k):
        t = k * h
        mean = x + h * (2.0 * field(x, t) - x / (t + h))
        return mean, jnp.full_like(x, jnp.sqrt(h) * sigma(t, h))

    return step


def rollout(fine: Field, base: Field, x0: Vector, steps: int, key: PRNGKey) -> Float[Array, "n d"]:
    """x_0 ... x_K, [K + 1, d], under the field `fine`, the last step without noise and by the base; key: of the noises.

    x_0 ~ N(0, I) must have been drawn from another key.
    """
    xs = kernel.rollout(memoryless(fine, steps), x0, steps - 1, key)
    last = xs[-1]
    end = last + base(last, jnp.asarray(1.0 - 1.0 / steps, last.dtype)) / steps
    return jnp.concatenate([xs, end[None]])


class Targets(eqx.Module):
    """Where a roll-out was, and what is to be learned there, one row for each of its K steps."""

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
        """v_b - sigma^2 / 2 a: its conditional mean given x_i is the field sought."""
        return self.base - 0.5 * self.sigma[:, None] ** 2 * self.adjoint

    def control(self, field: Field) -> Float[Array, "K d"]:
        """u_i = 2 (v - v_b) / sigma_i of a field v."""
        return 2.0 / self.sigma[:, None] * (jax.vmap(field)(self.x, self.t) - self.base)

    def error(self, control: Float[Array, "K d"]) -> Float[Array, "K d"]:
        """u_i + sigma_i a_{i+1}, whose mean square is the loss; at the optimum its mean given x_i is 0."""
        return control + self.sigma[:, None] * self.adjoint


def lean_adjoint(base: Field, xs: Float[Array, "n d"], slope: Vector) -> Targets:
    """The targets of a roll-out xs [K + 1, d]; slope: grad g(x_K).

    What g sees of x_K is the caller's business. Where it is Q(clip(x)), `slope` is 0 in the coordinates that lie
    outside the box, and so is their adjoint: nothing pulls them back, as the clipped action would not change. That is
    the tilt of the actions that are carried out, and what the released code does too.
    """
    steps = xs.shape[0] - 1
    h = 1.0 / steps

    def back(a, inputs):
        x, k = inputs
        t = k * h
        v, transposed = jax.vjp(lambda x: base(x, t), x)
        (pulled,) = transposed(a)
        # The last step is x + h v_b; all others have twice the velocity and go back to the origin.
        last = k == steps - 1
        before = a + h * jnp.where(last, pulled, 2.0 * pulled - a / (t + h))
        return before, (v, a)

    k = jnp.arange(steps, dtype=xs.dtype)
    _, (v, after) = jax.lax.scan(back, slope, (xs[:-1], k), reverse=True)
    return Targets(xs[:-1], k * h, v, after)


def path_kl(control: Float[Array, "K d"]) -> Scalar:
    """sum_i h |u_i|^2 / 2, in nats: its mean over roll-outs is the relative entropy of the paths to those of the base.

    It bounds that of the ends; at the optimum both are equal but for what steps of finite length add.
    """
    return 0.5 * jnp.sum(control**2) / control.shape[0]
