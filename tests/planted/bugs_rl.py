"""In what agents share: advantages, critics, temperatures, replay."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from tests.planted import bug, wrong

from contraflow.agents.online import rfm
from contraflow.data.replay import Buffer
from contraflow.data.samplers import NStep
from contraflow.flow.support import Real
from contraflow.nets.critic import Mean, Min, SubsetMin
from contraflow.nets.heads import Categorical, Point, Quantile
from contraflow.rl import advantage, critics, temperature

HEADS = "nets/test_heads.py::"
CRITICS = "rl/test_rl_critics.py::"
REPLAY = "data/test_buffer.py::"
TEMPERATURE = "rl/test_rl_temperature.py::"
GAE = "agents/test_ppo.py::test_gae_by_hand"


@bug(GAE)
def truncation_ends_the_return(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, advantage, "gae")
    def gae(right, reward, value, following, terminated, truncated, gamma, lam):
        return right(reward, value, following, terminated | truncated, truncated, gamma, lam)


@bug(GAE)
def advantages_run_on_into_the_next_episode(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, advantage, "gae")
    def gae(right, reward, value, following, terminated, truncated, gamma, lam):
        return right(reward, value, following, terminated, jnp.zeros_like(truncated), gamma, lam)


@bug("agents/test_ppo.py::test_dummy_rows_have_no_part_in_advantages")
def dummy_rows_count_in_the_moments_of_advantages(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, advantage, "normalise")
    def normalise(right, x, weight):
        return right(x, jnp.ones_like(weight))


@bug(HEADS + "test_quantiles_of_what_was_seen")
def quantiles_from_above(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Quantile, "loss")
    def loss(right, self, out, target):
        return right(self, -out, -target)


@bug("nets/test_heads.py", "rl/test_rl_critics.py")
def critics_are_mixed_as_outputs_and_not_as_laws(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Categorical, "mix")
    def mix(right, self, outs, weights):
        return jax.nn.softmax(weights @ outs)


@bug(HEADS + "test_categorical_targets_are_laws_even_at_the_ends")
def a_normal_law_is_cut_off_at_the_ends(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Categorical, "_beyond", 0.0)


@bug(HEADS + "test_bellman_moves_the_mean")
def the_soft_bonus_is_left_out_of_the_law_of_the_return(patch: pytest.MonkeyPatch) -> None:
    for head in (Point, Quantile, Categorical):

        @wrong(patch, head, "bellman")
        def bellman(right, self, law, reward, discount, shift):
            return right(self, law, reward, discount, jnp.zeros_like(shift))


@bug(CRITICS + "test_what_several_critics_are_worth")
def the_largest_of_several_critics(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Min, "__call__")
    def largest(right, self, q, key=None):
        return right(self, -q)


@bug(CRITICS + "test_what_several_critics_are_worth")
def a_lower_confidence_bound_above_the_mean(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Mean, "__call__")
    def bound(right, self, q, key=None):
        weights, shift = right(self, q)
        return weights, -shift


@bug(CRITICS + "test_what_several_critics_are_worth")
def the_subset_is_that_of_the_smallest(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, SubsetMin, "__call__")
    def smallest(right, self, q, key=None):
        return Min()(q)


@bug("contract/test_contract_agents.py::test_target_moves_by_tau_towards_the_new_critic")
def target_critics_stay_where_they_are(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(critics, "polyak", lambda online, target, tau: target)


@bug(CRITICS + "test_polyak")
def target_critics_move_by_one_less_tau(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, critics, "polyak")
    def polyak(right, online, target, tau):
        return right(online, target, 1.0 - tau)


@bug(TEMPERATURE + "test_too_much_entropy_cools")
def too_much_entropy_heats(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, temperature.Tuned, "following")
    def following(right, self, lam, step, entropy):
        return lam**2 / right(self, lam, step, entropy)


@bug(TEMPERATURE + "test_entropy_told_by_neighbours")
def entropy_as_if_actions_were_gaussian(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(temperature, "nearest_entropy", temperature.gaussian_entropy)


@bug(TEMPERATURE + "test_the_temperature_at_which_the_estimated_entropy_is_the_one_asked_for")
def the_entropy_is_estimated_from_four_particles(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, temperature, "nearest_entropy")
    def nearest_entropy(right, actions):
        return right(actions[:4])


@bug(TEMPERATURE + "test_the_entropy_that_is_tuned_is_that_of_the_policy")
def the_entropy_is_that_of_latents(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, rfm.RFM, "_entropy")
    def _entropy(right, self, state, obs, key):
        latent = replace(state, actor=replace(state.actor, spec=replace(state.actor.spec, support=Real())))
        return right(self, latent, obs, key)


@bug(REPLAY + "test_several_steps_join_rows_of_one_episode")
def rows_are_joined_across_episodes(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Buffer, "add")
    def add(right, self, obs, action, step):
        never, stored = jnp.zeros_like(step.terminated), right(self, obs, action, step)
        joined = right(self, obs, action, replace(step, terminated=never, truncated=never))
        return replace(joined, rows=replace(joined.rows, terminated=stored.rows.terminated))


@bug(REPLAY + "test_several_steps_join_rows_of_one_episode")
def joined_rewards_are_not_discounted(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, NStep, "__call__")
    def sample(right, self, rows, key, n):
        return right(replace(self, gamma=1.0), rows, key, n)


@bug(REPLAY + "test_invalid_rows_are_not_stored")
def dummy_steps_are_stored(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Buffer, "add")
    def add(right, self, obs, action, step):
        return right(self, obs, action, replace(step, valid=jnp.ones_like(step.valid)))
