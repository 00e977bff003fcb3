"""An environment that reports success, and rewards of the user's."""

import gymnasium
import numpy as np

from contraflow.envs.gymnasium import Gymnasium

LENGTH, AT = 6, 2


class Goal(gymnasium.Env):
    """Six steps; the observation is their number; the reward is the action, and success is told in step 2 alone (from
    0), where the action is above `bar`."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    bar = 0.0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.age = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        success = self.age == AT and action[0] > self.bar
        self.age += 1
        obs = np.full(1, self.age, np.float32)
        return obs, float(action[0]), False, self.age == LENGTH, {"success": success}


def goal(num_envs: int, seed: int) -> Gymnasium:
    return Gymnasium(Goal, num_envs, seed)


def twice_the_age(rows):
    """A reward of the user's: it reads what was observed before the step."""
    return 2 * rows["obs"][:, 0] + rows["action"][:, 0]


def wrong_shape(rows):
    return rows["obs"]
