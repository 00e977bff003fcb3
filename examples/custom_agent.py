"""An agent of one's own: a frozen dataclass of settings with `init`, `policy` and `update`, and nothing to register.

The cross-entropy method without a critic: move a Gaussian towards the best tenth of the actions in each batch.
From the command line, in this folder:
contraflow train custom_agent:CrossEntropy --trust custom_agent --env bandit:two-peak
"""

from dataclasses import dataclass

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow import Replay, Run, train


class Gaussian(eqx.Module):
    """The policy, and all that is learned: every leaf is an array, no key among them."""

    mean: Float[Array, " a"]
    log_std: Float[Array, " a"]

    def __call__(self, obs, key, greedy=True):
        noise = 0.0 if greedy else jr.normal(key, self.mean.shape)
        return jnp.clip(self.mean + jnp.exp(self.log_std) * noise, -1.0, 1.0)


@dataclass(frozen=True)
class CrossEntropy:
    elite: float = 0.1
    rate: float = 0.05

    def __post_init__(self):
        if not 0 < self.elite <= 1:
            raise ValueError(f"elite is a share in (0, 1], got {self.elite}")

    def init(self, key, spec):
        return Gaussian(jnp.zeros(spec.action_dim), jnp.full(spec.action_dim, -0.5, float))

    def policy(self, state):
        return state

    def update(self, state, batch, key):
        threshold = jnp.quantile(batch.reward, 1 - self.elite)
        weight = (batch.reward >= threshold) / jnp.sum(batch.reward >= threshold)
        mean = weight @ batch.action
        std = jnp.sqrt(weight @ (batch.action - mean[None]) ** 2 + 1e-4)
        state = Gaussian(
            state.mean + self.rate * (mean - state.mean), state.log_std + self.rate * (jnp.log(std) - state.log_std)
        )
        return state, {"threshold": threshold, "std": jnp.mean(std)}


if __name__ == "__main__":
    run = Run(CrossEntropy(), Replay("probe:action", num_envs=16, collect=400), steps=4_000, eval_every=2_000)
    result = train(run, "runs/example-cross-entropy")
    print(f"mean return {result.returns.mean():.3f}; the best possible is 1")
