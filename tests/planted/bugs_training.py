"""In training, comparisons of experiments, and samplers of densities."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.planted import bug, wrong

from contraflow.core import settings
from contraflow.data.replay import Buffer
from contraflow.data.samplers import Uniform
from contraflow.experiments.report import statistics
from contraflow.rl import diagnostics
from contraflow.sampling import distances, fab
from contraflow.sampling.fab import Fab
from contraflow.training import checkpoint, evaluate
from contraflow.training import run as driver
from contraflow.training.run_writer import RunWriter
from contraflow.training.sources import replay, rollouts

ONLINE = "train/test_online.py::"
SEEDS = "train/test_seeds.py::"
TRAIN = "train/test_train.py::"
STATISTICS = "experiments/test_report_statistics.py::"
FAB = "sampling/test_sample_fab.py::"


@bug(ONLINE + "test_counters_returns_and_buffer")
def the_observation_after_a_reset_is_stored_as_successor(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Buffer, "add")
    def add(right, self, obs, action, step):
        return right(self, obs, action, replace(step, next_obs=step.obs))


@bug(ONLINE + "test_counters_returns_and_buffer")
def all_environments_act_with_one_key(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, replay, "decide")
    def decide(right, policy, spec, obs, iteration, key):
        return jnp.repeat(right(policy, spec, obs, iteration, key)[:1], spec.num_envs, axis=0)


@bug(ONLINE + "test_counters_returns_and_buffer")
def every_step_acts_with_one_key(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, replay, "decide")
    def decide(right, policy, spec, obs, iteration, key):
        return right(policy, spec, obs, 0 * iteration, key)


@bug("data/test_samplers.py::test_chunks_of_replay_are_discounted_by_the_steps_taken")
def a_decision_of_several_steps_is_discounted_once(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Uniform, "__call__")
    def call(right, self, rows, key, n):
        return right(self, replace(rows, steps=None), key, n)


@bug("train/test_onpolicy.py::test_the_update_sees_what_happened")
def an_update_sees_its_rollout_backwards(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, rollouts, "learn")
    def learn(right, agent, learner, obs, extras, after, key):
        return right(agent, learner, *jax.tree.map(lambda x: x[::-1], (obs, extras, after)), key)


@bug("train/test_checkpoint.py::test_swapping_two_fields_swaps_no_arrays")
def arrays_are_read_by_their_place(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, checkpoint, "named_leaves")
    def leaves(right, tree):
        return {str(place): leaf for place, leaf in enumerate(right(tree).values())}


@bug("train/test_resume.py::test_a_stopped_half_continues_bitwise")
def a_resumed_run_counts_its_iterations_anew(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, checkpoint, "load")
    def load(right, *args):
        carry = right(*args)
        return replace(carry, learner=replace(carry.learner, iteration=jnp.zeros((), jnp.int32)))


@bug("data/test_buffer.py::test_several_steps_join_rows_of_one_episode")
def replay_joins_what_a_resumed_simulator_began_anew(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Buffer, "cut", lambda self: self)


@bug(SEEDS + "test_each_seed_is_the_run_that_it_would_be_alone")
def seeds_trained_at_once_share_a_key(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, driver, "epoch")
    def epoch(right, stage, agent, world, carry, keys, n, iterated):
        return right(stage, agent, world, carry, jnp.stack([keys[0]] * len(keys)), n, iterated)


@bug(ONLINE + "test_every_action_of_an_evaluation_has_noise_of_its_own")
def every_step_of_an_evaluation_draws_the_same_noise(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, evaluate, "_advance")
    def advance(right, policy, env, greedy, carry, key, i):
        return right(policy, env, greedy, carry, key, 0 * i)


@bug(TRAIN + "test_short_episodes_do_not_count_more_than_long_ones")
def the_first_episodes_to_end_are_counted(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, evaluate, "_count")
    def count(right, advance, num_envs, seeds, episodes, n, max_steps):
        running, finished, i = np.zeros((seeds, num_envs)), [[] for _ in range(seeds)], 0
        while min(map(len, finished)) < episodes:
            reward, done, valid = (np.asarray(x) for x in advance(i))
            for j in range(n):
                running += np.where(valid[:, j], reward[:, j], 0.0)
                for s, e in np.argwhere(done[:, j] & valid[:, j]):
                    finished[s].append(float(running[s, e]))
                    running[s, e] = 0.0
            i += n
        return np.array([ended[:episodes] for ended in finished])


@bug(TRAIN + "test_evaluation_is_greedy_unless_told_otherwise")
def evaluations_explore(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, evaluate, "act_batch")
    def act(right, policy, obs, key, first, greedy=True):
        return right(policy, obs, key, first, False)


@bug(TRAIN + "test_the_best_policy_is_that_of_the_best_evaluation")
def the_newest_policy_is_kept_for_the_best(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, RunWriter, "evaluation")
    def evaluation(right, self, *args):
        self._best = -np.inf
        right(self, *args)


@bug("train/test_diagnostics.py::test_variance_is_no_bias")
def variance_counts_as_bias_of_a_target(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(diagnostics, "REPEATS", 1)


@bug(STATISTICS + "test_the_probability_of_improvement")
def ties_count_for_nobody(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(statistics, "improvement", lambda x, y: (x[..., :, None, :] > y[..., None, :, :]).mean((-3, -2, -1)))


@bug(STATISTICS + "test_the_interquartile_mean_is_that_of_the_middle_half")
def quartiles_are_cut_task_by_task(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, statistics, "iqm")
    def iqm(right, scores):
        return np.mean([right(scores[..., task : task + 1]) for task in range(scores.shape[-1])], 0)


@bug(STATISTICS + "test_tasks_are_strata")
def whole_runs_are_drawn_for_all_tasks(patch: pytest.MonkeyPatch) -> None:
    along = np.take_along_axis
    patch.setattr(statistics.np, "take_along_axis", lambda x, rows, axis: along(x, rows[..., :1] + 0 * rows, axis))


class Alike:
    """A generator whose every draw is the first."""

    def integers(self, n, size):
        return np.random.Generator(np.random.PCG64(0)).integers(n, size=size)


@bug(STATISTICS + "test_the_two_sides_are_resampled_apart")
def both_sides_have_the_same_draws(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, statistics, "estimate")
    def estimate(right, *args, **options):
        with patch.context() as inside:
            inside.setattr(np.random, "default_rng", lambda seed: Alike())
            return right(*args, **options)


@bug(FAB + "test_weights_are_unbiased_on_a_gaussian")
def the_base_of_annealing_is_not_normalised(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fab, "log_normal", lambda x, mean, std: -0.5 * jnp.sum(((x - mean) / std) ** 2))


@bug(FAB + "test_the_optimum_of_the_weighted_regression_is_the_velocity_of_a_gaussian")
def endpoints_are_picked_whatever_their_weights(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Fab, "endpoints")
    def endpoints(right, self, buffer, key, n):
        return right(self, replace(buffer, log_w=0.0 * buffer.log_w), key, n)


@bug(FAB + "test_the_buffer_keeps_the_newest_rounds_and_tunes_the_moves")
def log_z_counts_places_that_are_still_empty(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, fab.Buffer, "log_z")
    def log_z(right, self):
        return right(replace(self, count=jnp.asarray(len(self.log_w))))


@bug("sampling/test_sample_distances.py::test_mmd2_is_unbiased")
def points_are_compared_with_themselves(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, distances, "mmd2")
    def mmd2(right, x, y):
        # right(u, u) = 2 (the mean without the diagonal less the mean with it).
        return right(x, y) - (right(x, x) + right(y, y)) / 2


@bug("test_trust.py::test_a_file_cannot_bring_in_more_than_was_named")
def one_trusted_module_opens_the_door_to_all(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, settings, "admit")
    def admit(right, path, trust):
        right(path, "all" if trust else "")

    patch.setattr("contraflow.envs.admit", settings.admit)
