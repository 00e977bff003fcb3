"""In data, environments, and what runs a trained policy."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.planted import bug, wrong

from contraflow.data import samplers
from contraflow.data.datasets import dataset, readers
from contraflow.data.datasets.dataset import Dataset
from contraflow.data.make import metaworld, ogbench
from contraflow.data.make.episodes import Maker
from contraflow.data.replay import Buffer
from contraflow.data.rows import Rows
from contraflow.data.samplers import Mixed
from contraflow.envs import chunk, episodes
from contraflow.envs.chunk import Chunked
from contraflow.envs.envpool import EnvPool
from contraflow.envs.gymnasium import Gymnasium
from contraflow.envs.probe import Probe
from contraflow.envs.reward import Rewarded
from contraflow.envs.ways import TwoWayArm
from contraflow.policy import base
from contraflow.runtime.policy import Policy
from contraflow.runtime.receding import Receding
from contraflow.training import evaluate
from contraflow.training.sources import base as base_source

SAMPLERS = "data/test_samplers.py::"
OFFLINE = "data/test_offline.py::"
CHUNK = "envs/test_env_chunk.py::"


@bug(SAMPLERS + "test_a_truncated_step_is_bootstrapped_and_a_terminated_one_is_not")
def terminated_steps_are_bootstrapped(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, samplers, "_batch")
    def batch(right, rows, first, last, action, reward, discount, *mask):
        return right(rows, first, last, action, reward, jnp.full_like(discount, discount.max()), *mask)


@bug(SAMPLERS + "test_every_row_by_hand[3-0.9-replay]")
def replay_takes_truncation_for_termination(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Buffer, "add")
    def add(right, self, obs, action, step):
        return right(self, obs, action, replace(step, terminated=step.terminated | step.truncated))


@bug(SAMPLERS + "test_every_row_by_hand[3-0.9-dataset]")
def the_discount_of_several_steps_lacks_one(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, samplers, "_follow")
    def follow(right, rows, first, steps, gamma):
        *rest, discount = right(rows, first, steps, gamma)
        return *rest, discount / gamma


@bug(SAMPLERS + "test_every_row_by_hand[3-0.9-dataset]")
def chunks_run_into_the_next_trajectory(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, samplers, "_chain")
    def chain(right, rows, first, steps):
        return right(replace(rows, last=jnp.full_like(rows.last, len(rows.last) - 1)), first, steps)


@bug(SAMPLERS + "test_every_row_by_hand[3-0.9-dataset]")
def the_successor_is_that_of_the_first_step(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, samplers, "_batch")
    def batch(right, rows, first, last, *rest):
        return right(rows, first, first, *rest)


@bug(SAMPLERS + "test_a_mixture_holds_its_share_in_every_part")
def the_shares_of_a_mixture_are_swapped(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Mixed, "__call__")
    def draw(right, self, rows, key, n):
        return right(replace(self, ratio=1.0 - self.ratio), rows, key, n)


@bug("data/test_buffer.py::test_sampling_is_uniform_over_what_is_filled")
def places_that_are_still_empty_are_drawn(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Rows, "draw")
    def draw(right, self, key, n):
        return right(replace(self, size=jnp.asarray(len(self.reward), jnp.int32)), key, n)


@bug(OFFLINE + "test_what_learns_values_gets_the_rows_with_a_successor")
def the_step_before_a_dropped_one_goes_on(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Dataset, "with_successor")
    def kept(right, self):
        return replace(right(self), end=np.append(self.end[self.known][:-1], True))


@bug(OFFLINE + "test_actions_are_converted_to_the_range_of_the_environment")
def actions_keep_their_centre(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, dataset, "_unit")
    def unit(right, name, raw, bounds, clip, said, outside):
        half = (bounds[1] - bounds[0]) / 2
        return right(name, raw, (-half, half), True, said, outside)


@bug(OFFLINE + "test_a_step_without_successor_is_kept_and_marked")
def successors_that_were_not_recorded_count_as_known(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, dataset, "unrecorded")
    def shifted(right, rows):
        return right(rows) | {"known": np.ones(len(rows["end"]), bool)}


@bug("envs/test_env_gymnasium.py::test_vector_env_rows")
def gymnasium_reports_truncation_as_termination(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Gymnasium, "_step_vector")
    def step(right, self, state, scaled):
        state, after = right(self, state, scaled)
        return state, replace(after, terminated=after.terminated | after.truncated)


@bug("envs/test_env_gymnasium.py::test_vector_env_rows")
def gymnasium_hands_out_the_new_episode_as_successor(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Gymnasium, "_step_vector")
    def step(right, self, state, scaled):
        state, after = right(self, state, scaled)
        return state, replace(after, next_obs=after.obs)


@bug("envs/test_env_gymnasium.py::test_vector_env_rows")
def the_step_that_only_resets_counts(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Gymnasium, "_step_vector")
    def step(right, self, state, scaled):
        state, after = right(self, state, scaled)
        return state, replace(after, valid=np.ones_like(after.valid))


@bug("envs/test_env_control.py::test_ends_are_truncations_and_the_last_observation_is_true")
def a_control_task_ends_for_good_at_its_time_limit(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, episodes, "step")
    def step(right, env, state, action):
        state, after = right(env, state, action)
        return state, replace(after, terminated=after.truncated, truncated=after.terminated)


@bug("envs/test_env_ways.py::test_who_arrives_with_the_last_step_is_not_cut_off")
def who_arrives_with_the_last_step_is_cut_off(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, episodes, "step")
    def step(right, env, state, action):
        moved, after = right(env, state, action)
        return moved, replace(after, truncated=state.age + 1 >= env.spec.episode_length)


@bug("envs/test_env_ways.py::test_everything_has_its_mirror_image")
def the_arm_is_hindered_on_one_side_only(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, TwoWayArm, "hits")
    def hits(right, self, body, centre):
        return right(self, body, (abs(centre[0]), centre[1]))


@bug("envs/test_env_probe.py::test_random_starts_differ_between_copies_and_episodes")
def every_episode_starts_alike(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Probe, "step")
    def step(right, self, state, action):
        moved, after = right(self, state, action)
        return replace(moved, key=jax.random.clone(state.key)), after


@bug(CHUNK + "test_the_reward_of_a_chunk_is_the_discounted_sum[0.5-jax]")
def the_first_reward_of_a_chunk_is_discounted(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Chunked, "step")
    def step(right, self, state, action):
        state, total = right(self, state, action)
        return state, replace(total, reward=self.gamma * total.reward)


@bug(CHUNK + "test_a_chunk_ends_with_its_episode[jax]")
def copies_that_wait_are_not_held(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(chunk, "_held", lambda active, new, old: new)


@bug(CHUNK + "test_a_chunk_ends_with_its_episode[host]")
def a_chunk_counts_as_one_step(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, chunk, "_joined")
    def joined(right, xp, total, *rest):
        return replace(right(xp, total, *rest), steps=total.steps)


@bug("runtime/test_receding.py::test_ensembling_is_the_weighted_mean_of_all_plans[0.3]")
def the_oldest_plan_weighs_least(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Receding, "_plan")
    def plan(right, self, chunk, due):
        self._decay = -self._decay
        right(self, chunk, due)
        self._decay = -self._decay


@bug("runtime/test_receding.py::test_an_episode_of_one_copy_starts_anew")
def a_new_episode_goes_on_with_the_old_plan(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Receding, "reset", lambda self, copies=slice(None): None)


@bug("policy/test_policies.py::test_rows_of_a_batch_are_numbered")
def every_row_of_a_batch_has_the_same_noise(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, base, "act_batch")
    def act(right, policy, obs, key, first, greedy=True):
        return jnp.concatenate([right(policy, row[None], key, first, greedy) for row in obs])


@bug("runtime/test_policy.py::test_one_observation_or_many")
def actions_are_numbered_by_call(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Policy, "__call__")
    def act(right, self, obs, explore=False):
        before = self._seen
        action = right(self, obs, explore)
        self._seen = before + 1
        return action


@bug("runtime/test_policy.py::test_actions_in_the_range_of_the_robot")
def a_robot_moves_the_other_way(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Policy, "raw")
    def raw(right, self, action):
        return right(self, -np.asarray(action))


@bug("data/test_make.py::test_a_set_follows_from_its_seed_alone")
def episodes_of_a_set_share_one_seed(patch: pytest.MonkeyPatch):
    @wrong(patch, Maker, "episode")
    def _(right, self, number):
        return right(self, 0)


@bug("data/test_make.py::test_an_episode_does_not_know_what_was_made_before_it")
def oracles_go_on_drawing_from_where_they_were(patch: pytest.MonkeyPatch):
    patch.setattr(np.random, "seed", lambda seed: None)
    patch.setattr(np.random, "set_state", lambda state: None)


@bug("data/test_make.py::test_walks_arrive")
def a_walk_stays_in_the_middle_of_the_cell_of_its_goal(patch: pytest.MonkeyPatch):
    @wrong(patch, ogbench.Walk, "__init__")
    def _(right, self, world, kind):
        right(self, world, kind)
        # Two cells are never the same: the way goes to the centre of the last one.
        real = self.maze.xy_to_ij
        self.maze.xy_to_ij = lambda xy: Cell(real(xy))

    class Cell(tuple):
        __slots__ = ()
        __ne__ = lambda self, other: True
        __hash__ = tuple.__hash__


@bug("envs/test_env_ogbench.py::test_success_agrees_with_the_data")
def data_are_rewarded_for_the_state_they_lead_to(patch: pytest.MonkeyPatch):
    @wrong(patch, readers, "_ogbench")
    def _(right, rows, name, success, notes):
        return right(rows, name, "post", notes)


@bug("train/test_success.py::test_a_success_within_a_chunk_counts")
def success_of_a_chunk_is_that_of_its_last_action(patch: pytest.MonkeyPatch):
    patch.setattr(chunk, "_either", lambda one, other: other)


@bug("train/test_rewards.py::test_both_parts_of_a_run_learn_from_the_same")
def rewards_of_the_environment_are_not_relabelled(patch: pytest.MonkeyPatch):
    patch.setattr(base_source, "relabelling", lambda source: ("dense", 0.0))


@bug("train/test_rewards.py::test_in_jax_too", "train/test_rewards.py::test_an_environment_with_other_rewards")
def returns_are_made_of_what_is_learned_from(patch: pytest.MonkeyPatch):
    @wrong(patch, Rewarded, "step")
    def _(right, self, state, action, *active):
        state, step = right(self, state, action, *active)
        return state, replace(step, undiscounted=None)


@bug("train/test_success.py::test_a_success_ends_with_its_episode")
def a_success_outlives_its_episode(patch: pytest.MonkeyPatch):
    @wrong(patch, evaluate, "_count")
    def _(right, advance, *sizes):
        said = []

        def went_on(i):
            *counted, success = advance(i)
            said.append(success)
            return *counted, np.any(said, axis=0)

        return right(went_on, *sizes)


@bug("data/test_make_metaworld.py::test_the_script_reaches_the_goal_that_it_sees")
def metaworld_hides_its_goals(patch: pytest.MonkeyPatch):
    @wrong(patch, metaworld.Script, "__init__")
    def _(right, self, name):
        right(self, name)
        import envpool

        self.pool = lambda seed: envpool.make_gymnasium("MetaWorld/Reach-v3", num_envs=1, num_threads=1, seed=seed)


@bug("data/test_make_metaworld.py::test_the_script_reaches_the_goal_that_it_sees")
def our_metaworld_hides_its_goals(patch: pytest.MonkeyPatch):
    @wrong(patch, EnvPool, "_build")
    def _(right, self, seed):
        self._settings["partially_observable"] = True
        return right(self, seed)


@bug("data/test_make_metaworld.py::test_the_noise_of_a_set_has_another_strength_in_each_episode")
def all_episodes_have_the_strongest_noise(patch: pytest.MonkeyPatch):
    @wrong(patch, metaworld.Script, "run")
    def _(right, self, rng):
        return right(self, Loudest(rng))


class Loudest:
    """A generator whose uniform numbers are the largest."""

    def __init__(self, rng):
        self.rng = rng

    def uniform(self, low, high, *size):
        return self.rng.uniform(low, high, *size) if size else high

    def __getattr__(self, name):
        return getattr(self.rng, name)
