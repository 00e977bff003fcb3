"""A search for the noise from which a trained flow starts (FlowOpt, 2510.22010). Nothing is trained.

    z <- z + rate grad r(f(z)),    for inversion    z <- z - rate (f(z) - y),

with f the whole sampler, and the identity in place of its Jacobian: the sampler is only called.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from contraflow.core.types import PRNGKey, UserError
from contraflow.flow.path import Scalar, Vector
from contraflow.policy.base import Cost, Policy, innermost
from contraflow.policy.flow import FlowPolicy, solves_velocity
from contraflow.policy.normalise import Normalised
from contraflow.policy.value import as_value, under

Sampler = Callable[[Vector], Vector]


class Searched(eqx.Module):
    """A flow that starts where a search for a better end of its ODE has led. Without iterations it is the policy.

    `reward` is a value as in `contraflow.policy.guided`. Each iteration takes a whole solution of the ODE.
    """

    policy: FlowPolicy | Normalised
    reward: Any
    rate: Scalar
    iterations: int = eqx.field(static=True, default=8)

    def __call__(self, obs: Vector, key: PRNGKey, greedy: bool = True) -> Float[Array, " a"]:
        policy: FlowPolicy = innermost(self.policy)
        seen = self.policy.stats(obs) if isinstance(self.policy, Normalised) else obs
        flow, cond = policy.flow, policy.condition(seen)
        reward = under(self.reward, obs)
        slope = jax.grad(lambda x: reward(flow.action(x)))
        sampler = lambda z: flow.sample(z, cond)
        return flow.action(sampler(search(sampler, slope, flow.noise(key), self.rate, self.iterations)))

    @property
    def cost(self) -> Cost:
        return Cost(1, innermost(self.policy).cost.nfe * (self.iterations + 1), self.iterations)


def search(
    sampler: Sampler, slope: Callable[[Vector], Vector], z: Vector, rate: float | Scalar, iterations: int
) -> Vector:
    """Returns z [d] after `iterations` of z <- z + rate slope(f(z)).

    Near an end with the slope y - x the error becomes (I - rate J) times itself, J the Jacobian of f. It shrinks if all
    eigenvalues m of J have |1 - rate m| < 1: for a symmetric J that is positive definite, if rate < 2 / max m.
    """
    return jax.lax.fori_loop(0, iterations, lambda _, z: z + rate * slope(sampler(z)), z)


def invert(sampler: Sampler, y: Vector, z: Vector, rate: float, iterations: int) -> Vector:
    """Returns a noise [d] that f maps near y [d], from the first guess z: z <- z - rate (f(z) - y).

    With the condition of another sample this edits y; fewer iterations keep less of y.
    """
    return search(sampler, lambda x: y - x, z, rate, iterations)


def searched(policy: Policy, reward: Any, rate: float, iterations: int = 8) -> Searched:
    """Returns the policy with a search for its noise.

    Raises UserError for a policy that is more than a flow, and for a flow that is not a velocity on the linear path or
    has a stochastic solver.
    """
    if iterations < 0 or not rate > 0:
        raise ValueError(f"a search needs a positive rate and no negative iterations, got {rate} and {iterations}")
    bare = policy.policy if isinstance(policy, Normalised) else policy
    if not isinstance(bare, FlowPolicy):
        raise UserError(
            f"a search for the noise needs a policy that is a flow, as cloned ones are: {type(bare).__name__}"
        )
    if not solves_velocity(bare.flow.spec):
        raise UserError("a search for the noise is for velocities on the linear path, solved without noise, as by Ddim")
    return Searched(policy, as_value(reward), jnp.asarray(rate, jnp.float32), iterations)  # pyright: ignore[reportArgumentType]
