"""Generation as a Markov chain with a density: x_0 ~ N(0, I), x_{k+1} ~ N(mean_k(x_k), diag std_k^2).

A method that optimises a policy through generation consists of a kernel (where noise enters, and how much) and of the
steps whose densities it learns from: all of them (ReinFlow, Flow-GRPO), the last few (DPPO) or a window (MixGRPO).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import jax.random as jr
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Int

from contraflow.core.types import PRNGKey
from contraflow.flow.path import AbstractPath, Scalar, Vector

Kernel = Callable[[Vector, Int[Array, ""]], tuple[Vector, Vector]]
"""(mean, std) of x_{k+1} given (x_k, k)."""


def rollout(kernel: Kernel, x0: Vector, steps: int, key: PRNGKey) -> Float[Array, "n d"]:
    """Returns all states x_0 ... x_steps [steps + 1, d] of the chain that starts at x0 [d]."""

    def step(x, inputs):
        k, noise = inputs
        mean, std = kernel(x, k)
        new = mean + std * noise
        return new, new

    _, xs = jax.lax.scan(step, x0, (jnp.arange(steps), jr.normal(key, (steps, *x0.shape))))
    return jnp.concatenate([x0[None], xs])


def log_prob(kernel: Kernel, chain: Float[Array, "n d"], learned: Sequence[int]) -> Float[Array, "l d"]:
    """Returns log N(x_{k+1}; mean_k(x_k), std_k^2) of each coordinate, [l, d], for the l steps k in `learned`.

    Every learned step needs std > 0. The sum over a row is the log-density of that step given the state before it. The
    chain [steps + 1, d] is held fixed.
    """
    k = jnp.asarray(learned)

    def one(k, x, new):
        mean, std = kernel(x, k)
        return norm.logpdf(new, mean, std)

    return jax.vmap(one)(k, chain[k], chain[k + 1])


def posterior_std(path: AbstractPath, t: Scalar, r: Scalar) -> Scalar:
    """Returns the standard deviation [] of x_r given x_t and x1, r > t:
    beta_r sqrt(1 - (alpha_t beta_r)^2 / (alpha_r beta_t)^2).

    On any path, this is the noise of DDPM (2006.11239, eq. 7) and of DDIM with eta = 1 (2010.02502, eq. 16).
    """
    ratio = path.alpha(t) * path.beta(r) / (path.alpha(r) * path.beta(t))
    return path.beta(r) * jnp.sqrt(jnp.maximum(1.0 - ratio**2, 0.0))


def forward_std(path: AbstractPath, t: Scalar, r: Scalar) -> Scalar:
    """Standard deviation of x_t given x_r, r > t: sqrt(beta_t^2 - (alpha_t beta_r / alpha_r)^2).

    On a variance-preserving path that is DDPM's sqrt(beta_k).
    """
    return jnp.sqrt(jnp.maximum(path.beta(t) ** 2 - (path.alpha(t) * path.beta(r) / path.alpha(r)) ** 2, 0.0))
