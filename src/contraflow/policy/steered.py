"""Rewards that steer a trained flow while it samples. Nothing is trained.

`Steered` changes the velocity of each step, by the gradient of a function of the state or of the predicted end:

    NRG (2501.13918)                    v + weight (1 - t) / t grad_x V(x_t, t)
    controller of FOCUS (2510.02315)    v - weight grad_x f(x_t, t)

With V(x_t, t) = log E[exp(r) | x_t] NRG samples p exp(r) exactly: (1 - t) / t times a change of the score is the
change of the velocity. Other functions are approximations, such as V = r at the predicted end, or a learned reward of
noisy samples.

`Searched` leaves the flow as it is and changes the noise z from which it starts (FlowOpt, 2510.22010):

    z <- z + rate grad r(f(z)),    for inversion    z <- z - rate (f(z) - y),

with f the whole sampler, and the identity in place of its Jacobian: the sampler is only called.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from contraflow.core.types import PRNGKey, UserError
from contraflow.flow.model import Ddpm, Flow
from contraflow.flow.path import Linear, Scalar, Vector
from contraflow.flow.solver import EulerMaruyama
from contraflow.policy.base import Cost, Policy, innermost
from contraflow.policy.flow import FlowPolicy
from contraflow.policy.normalise import Normalised

Sampler = Callable[[Vector], Vector]
At = Literal["state", "end"]
Gain = Literal["score", "equal"]
FLOOR = 0.02  # the gain 1 / t is for gradients that are 0 at t = 0; functions that are only nearly so would blow up


class Push(eqx.Module):
    """A network of velocities with a push, under one condition."""

    net: Any
    function: Any
    seen: Vector
    weight: Scalar
    at: At = eqx.field(static=True)
    gain: Gain = eqx.field(static=True)
    spec: Any = eqx.field(static=True)

    @property
    def dim(self) -> int:
        return self.net.dim

    def __call__(self, x: Vector, t: Scalar, cond: Float[Array, " c"]) -> Vector:
        clock, action = self.spec.clock, self.spec.support.action
        v = self.net(x, t, cond)
        time = jnp.clip(t / clock, FLOOR, 1.0) if self.gain == "score" else t / clock

        def value(x):
            if self.at == "state":
                return self.function(x, time, self.seen)
            return self.function(action(x + (1.0 - time) * self.net(x, clock * time, cond)), self.seen)

        push = (1.0 - time) / time if self.gain == "score" else 1.0
        return v + self.weight * push * jax.grad(value)(x)


class Steered(eqx.Module):
    """A flow that is pushed up a function at each step. With weight 0 it is the policy itself.

    The function takes (sample, condition) at the predicted end, or (x_t, t, condition) at the state. It is a module, or
    a plain function given by `steered`.
    """

    policy: FlowPolicy | Normalised
    function: Any
    weight: Scalar
    at: At = eqx.field(static=True, default="end")
    gain: Gain = eqx.field(static=True, default="score")

    def pushed(self, obs: Vector) -> Any:
        """Returns the policy under one condition."""
        policy: FlowPolicy = innermost(self.policy)
        flow = policy.flow
        net = Push(flow.net, self.function, obs, self.weight, self.at, self.gain, flow.spec)
        policy = replace(policy, flow=replace(flow, net=net))
        return replace(self.policy, policy=policy) if isinstance(self.policy, Normalised) else policy

    def __call__(self, obs: Vector, key: PRNGKey, greedy: bool = True) -> Float[Array, " a"]:
        return self.pushed(obs)(obs, key, greedy)

    @property
    def cost(self) -> Cost:
        """Each step also takes a gradient of the function, at the end through one more evaluation of the network."""
        nfe = innermost(self.policy).cost.nfe
        return Cost(1, nfe, nfe)


class Plain(eqx.Module):
    """A function without parameters as part of a policy."""

    function: Callable[..., Scalar] = eqx.field(static=True)

    def __call__(self, *args: Any) -> Scalar:
        return self.function(*args)


class Searched(eqx.Module):
    """A flow that starts where a search for a better end of its ODE has led. Without iterations it is the policy.

    `reward` is as the function of `Steered` at the end. Each iteration takes a whole solution of the ODE.
    """

    policy: FlowPolicy | Normalised
    reward: Any
    rate: Scalar
    iterations: int = eqx.field(static=True, default=8)

    def __call__(self, obs: Vector, key: PRNGKey, greedy: bool = True) -> Float[Array, " a"]:
        policy: FlowPolicy = innermost(self.policy)
        seen = self.policy.stats(obs) if isinstance(self.policy, Normalised) else obs
        flow, cond = policy.flow, policy.condition(seen)
        slope = jax.grad(lambda x: self.reward(flow.action(x), obs))
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


def steered(policy: Policy, function: Any, weight: float, at: At = "end", gain: Gain = "score") -> Steered:
    """Returns the policy pushed by `weight` times the gradient of a function, by default as NRG at the predicted end.

    FOCUS's controller is gain="equal" with the function -f. Raises UserError for a policy that is more than a flow, and
    for a flow that is not a velocity on the linear path.
    """
    _flow(policy, "steering")
    return Steered(policy, _part(function), jnp.asarray(weight, jnp.float32), at, gain)  # pyright: ignore[reportArgumentType]


def searched(policy: Policy, reward: Any, rate: float, iterations: int = 8) -> Searched:
    """Returns the policy with a search for its noise. Raises UserError as `steered`, and for a stochastic solver."""
    flow = _flow(policy, "a search for its noise")
    if iterations < 0 or not rate > 0:
        raise ValueError(f"a search needs a positive rate and no negative iterations, got {rate} and {iterations}")
    if isinstance(flow.spec.solver, EulerMaruyama | Ddpm):
        raise UserError("a search for its noise needs a flow without other noise: solve it by Ddim")
    return Searched(policy, _part(reward), jnp.asarray(rate, jnp.float32), iterations)  # pyright: ignore[reportArgumentType]


def _part(function: Any) -> Any:
    return function if isinstance(function, eqx.Module) else Plain(function)


def _flow(policy: Any, what: str) -> Flow:
    bare = policy.policy if isinstance(policy, Normalised) else policy
    if not isinstance(bare, FlowPolicy):
        raise UserError(f"{what} needs a policy that is a flow, as aligned or cloned ones are: {type(bare).__name__}")
    spec = bare.flow.spec
    plain = spec.predict == "velocity" and spec.clip is None and not spec.averaged and not spec.unit_input
    if not (plain and isinstance(spec.path, Linear)):
        raise UserError(f"{what} is for velocities on the linear path: train the flow with bc")
    return bare.flow
