"""Environments of one's own: a Gymnasium class, and a pure-JAX one that trains inside a compiled loop.

From the command line, in this folder:
contraflow train rfm --trust custom_environment --env custom_environment:Chase (or :reach)
"""

from dataclasses import dataclass

import gymnasium
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from contraflow import SIR, Critics, EnvSpec, Replay, Run, Step, train
from contraflow.envs.gymnasium import Gymnasium


class Reach(gymnasium.Env):
    """A point on a line is pushed to the origin within 20 steps."""

    action_space = gymnasium.spaces.Box(-0.2, 0.2, (1,), np.float32)
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.age = self.np_random.uniform(-1, 1, 1), 0
        return self.x.astype(np.float32), {}

    def step(self, action):
        self.x, self.age = self.x + action, self.age + 1
        return self.x.astype(np.float32), -float(abs(self.x[0])), False, self.age >= 20, {}


def reach(num_envs: int, seed: int) -> Gymnasium:
    """What `--env custom_environment:reach` calls: it may be a class or a function of these two."""
    return Gymnasium(Reach, num_envs, seed)


@dataclass(frozen=True)
class Chase:
    """The same in JAX, all copies at once; the state carries everything, its own key too."""

    num_envs: int = 1
    seed: int = 0

    @property
    def spec(self) -> EnvSpec:
        return EnvSpec(obs_dim=1, action_dim=1, num_envs=self.num_envs, episode_length=20, jittable=True)

    def reset(self, key):
        key, later = jr.split(key)
        x = jr.uniform(key, (self.num_envs, 1), minval=-1.0, maxval=1.0)
        return (x, jnp.zeros(self.num_envs, jnp.int32), later), x

    def step(self, state, action):
        x, age, key = state
        x, age = x + 0.2 * action, age + 1
        truncated = age >= 20  # the time limit; `terminated` would end the return as well
        (fresh_x, fresh_age, key), _ = self.reset(key)
        obs = jnp.where(truncated[:, None], fresh_x, x)  # what to act on next; `next_obs` stays the true successor
        no, yes = jnp.zeros(self.num_envs, bool), jnp.ones(self.num_envs, bool)
        step = Step(obs=obs, next_obs=x, reward=-jnp.abs(x[:, 0]), terminated=no, truncated=truncated, valid=yes)
        return (obs, jnp.where(truncated, fresh_age, age), key), step


if __name__ == "__main__":
    agent = SIR(critic=Critics(width=32, gamma=0.9))
    env = "custom_environment:Chase"
    source = Replay(env, num_envs=8, collect=400, updates=4, batch_size=64)
    run = Run(agent, source, steps=2_400, eval_every=1_200)
    result = train(run, "runs/example-chase", trust="all")
    print(f"mean return {result.returns.mean():.2f}; doing nothing gives about -10")
