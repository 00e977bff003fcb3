"""In agents that act beside or through a frozen policy."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from tests.planted import bug, wrong

from contraflow.agents.online.dsrl import DSRL
from contraflow.agents.online.residual import Residual
from contraflow.agents.onpolicy import flow_ppo
from contraflow.agents.onpolicy.flow_ppo import PlannedFlow
from contraflow.core.bounds import action_range
from contraflow.data.rows import Rows
from contraflow.flow.targets import log_normal
from contraflow.policy import served, start_noise
from contraflow.policy.start_noise import ByNoise, Prior, Steered
from contraflow.runtime import monitor
from contraflow.training.frozen import Frozen

DSRL_TESTS = "agents/test_dsrl.py::"
OVER_NOISE = "train/test_over_noise.py::"
RESIDUAL = "agents/test_residual.py::"


@bug(DSRL_TESTS + "test_the_prior_form_reaches_the_tilt_of_the_noise")
def the_prior_of_the_noise_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Prior, "draw")
    def draw(right, self, out, key):
        w, _ = right(self, out, key)
        return w, log_normal(w, *start_noise.moments(out))


@bug(DSRL_TESTS + "test_noise_is_valued_by_the_action_that_it_leads_to")
def noise_is_valued_by_the_action_of_no_noise(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Steered, "act")
    def act(right, self, obs, w):
        return right(self, obs, 0.0 * w)


@bug(DSRL_TESTS + "test_the_frozen_policy_never_changes")
def the_frozen_policy_is_trained(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, DSRL, "update")
    def update(right, self, state, batch, key):
        state, metrics = right(self, state, batch, key)
        base = state.base
        last = replace(base.net.last, bias=base.net.last.bias - 1e-4 * jnp.ones_like(base.net.last.bias))
        return replace(state, base=replace(base, net=replace(base.net, last=last))), metrics


@bug("runtime/test_monitor.py::test_the_order_statistic_covers")
def a_threshold_is_the_empirical_quantile(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, monitor, "order_statistic")
    def order_statistic(right, scores, delta):
        return float(np.quantile(scores, 1 - delta))


@bug("runtime/test_monitor.py::test_entropy_counts_full_cells")
def cells_grow_with_the_spread(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, monitor, "chunk_entropy")
    def chunk_entropy(right, actions, cell):
        return right(actions, cell * (actions.max() - actions.min() + 1.0) * 10)


FLOW_PPO = "agents/test_flow_ppo.py::"


@bug(FLOW_PPO + "test_ratios_of_another_policy_average_to_one")
def the_ratio_of_a_noisy_step_forgets_its_variance(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, PlannedFlow, "log_ratio")
    def log_ratio(right, self, obs, steps):
        return right(self, obs, steps) * steps.std


@bug(FLOW_PPO + "test_the_critic_learns_first")
def the_actor_does_not_wait_for_the_critic(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, flow_ppo, "improve")
    def improve(right, settings, *rest):
        return right(replace(settings, warmup=0), *rest)


@bug(OVER_NOISE + "test_over_the_noise_of_the_identity_it_is_the_agent_itself")
def noises_are_decoded_for_another_copy(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Frozen, "decode")
    def decode(right, self, obs, choice):
        return right(self, obs, choice[::-1])


@bug(OVER_NOISE + "test_the_best_noise_of_an_affine_policy_is_found")
def the_saved_policy_forgets_the_bound_of_the_noise(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, ByNoise, "noise")
    def noise(right, self, choice):
        return right(self, choice) / self.bound


@bug("runtime/test_served.py::test_actions_come_back_from_the_range_of_the_robot")
def served_actions_stay_in_the_range_of_the_robot(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(served, "action_range", lambda spec: action_range(replace(spec, low=(), high=())))


@bug(RESIDUAL + "test_the_edit_climbs_to_the_best_action_within_reach")
def the_distance_is_a_sum(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Residual, "update")
    def update(right, self, state, batch, key):
        return right(self, state, replace(batch, mask=batch.mask * batch.action.shape[-1]), key)


@bug(RESIDUAL + "test_a_large_weight_leaves_the_frozen_policy_and_a_person_overrules_it")
def a_person_is_not_heard(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Residual, "update")
    def update(right, self, state, batch, key):
        return right(self, state, replace(batch, human=None), key)


@bug("data/test_samplers.py::test_corrections_stay_with_their_actions")
def corrections_are_those_of_the_row_before(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Rows, "of")
    def of(right, data, successor=True):
        return right(replace(data, human=None if data.human is None else np.roll(data.human, 1)), successor)
