"""Bugs in policies aligned with a critic."""

from dataclasses import replace

import jax.numpy as jnp
from tests.planted import bug, wrong

from contraflow.training.sources import conditions, critic

FILE = "train/test_align_control.py"
TILT = f"{FILE}::test_with_a_quadratic_critic_a_gaussian_policy_becomes_the_tilt_of_each_state"


@bug(f"{TILT}[rfm-align]")
def the_level_of_a_state_is_part_of_its_reward(patch):
    @wrong(patch, critic.Advantage, "values")
    def values(right, self, seen):
        return 0.0 * right(self, seen)


@bug(f"{FILE}::test_the_reward_is_the_advantage_in_units_of_its_deviation")
def advantages_keep_the_units_of_the_critic(patch):
    @wrong(patch, critic, "advantage")
    def advantage(right, *args):
        return replace(right(*args), scale=jnp.ones(()))

    patch.setattr("tests.train.test_align_control.advantage", critic.advantage)


@bug(f"{FILE}::test_a_policy_is_aligned_with_the_critic_of_a_run")
def evaluations_reward_samples_and_play_nothing(patch):
    @wrong(patch, conditions.Conditions, "open")
    def opened(right, self, run, trust):
        found = right(self, run, trust)
        return replace(found, evaluation=replace(found.world.env, num_envs=run.eval_episodes))
