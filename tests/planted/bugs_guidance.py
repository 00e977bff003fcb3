"""In guidance and choice by values, in the search for weights of composed policies, and in adaptation."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from tests.planted import bug, wrong

from contraflow.experiments import weights
from contraflow.policy import best_of, guided, push, value
from contraflow.runtime import action_flow, adapt

GUIDED = "policy/test_guided.py::"
VALUES = "policy/test_values.py::"
TRANSFER = "runtime/test_transfer.py::"
WEIGHTS = "experiments/test_weights.py::"


@bug(GUIDED + "test_the_slope_is_that_at_the_predicted_end_within_the_box")
def guidance_asks_at_the_noisy_action(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, push.Push, "__call__")
    def pushed(right, self, x, t, cond):
        return self.flow.output(x, t, cond) + self.gain(t) * self.slope(x, t)


@bug(GUIDED + "test_the_slope_is_that_at_the_predicted_end_within_the_box")
def guidance_passes_through_the_prediction(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(guided, "QGF", guided.Rule("end", "equal"))


@bug(VALUES + "test_a_linear_reward_at_the_predicted_end_is_exact_between_gaussians")
def guidance_leaves_out_the_derivative_of_the_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(guided, "NRG", guided.Rule("held", "score"))


@bug(VALUES + "test_the_soft_value_makes_the_exact_tilt")
def the_push_of_nrg_has_no_gain(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, push.Push, "__call__")
    def pushed(right, self, x, t, cond):
        return right(replace(self, gain=lambda t: 1.0), x, t, cond)


@bug(VALUES + "test_without_weight_it_is_the_policy")
def guidance_applies_that_without_a_classifier_twice(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, push, "renetted")
    def renetted(right, flow, net):
        return replace(flow, net=net, spec=replace(flow.spec, clock=1.0))

    patch.setattr(guided, "renetted", push.renetted)


@bug(VALUES + "test_values_of_chunks_and_of_squashed_actions")
def the_slope_is_not_taken_through_tanh(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, guided, "_slope")
    def slope(right, support, value, y):
        return jax.grad(value)(support.action(y))


@bug(VALUES + "test_a_critic_trained_elsewhere_sees_its_own_normalisation")
def a_critic_from_elsewhere_sees_raw_observations(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, value.Judge, "under")
    def under(right, self, obs):
        return lambda action: self.critic.value(obs, action)


@bug(VALUES + "test_the_best_of_n_is_the_nth_order_statistic")
def one_of_the_candidates_is_left_out(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, best_of.Chosen, "__call__")
    def call(right, self, obs, key, greedy=True):
        return right(replace(self, n=max(self.n - 1, 1)), obs, key, greedy)


@bug(WEIGHTS + "test_only_the_fresh_score_is_unbiased")
def the_result_is_that_of_the_searched_episodes(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, weights, "search_weights")
    def search(right, play, candidates, episodes=200, fresh=400, halving=False, seed=0):
        return right(lambda w, n, s: play(w, n, seed), candidates, episodes, fresh, halving, seed)

    import tests.experiments.test_weights as tests

    patch.setattr(tests, "search_weights", weights.search_weights)


@bug(WEIGHTS + "test_the_best_weight_is_found_and_the_cost_is_that_of_the_grid")
def the_worst_weight_wins(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, weights, "search_weights")
    def search(right, play, candidates, episodes=200, fresh=400, halving=False, seed=0):
        return right(lambda w, n, s: 1.0 - jnp.asarray(play(w, n, s)), candidates, episodes, fresh, halving, seed)

    import tests.experiments.test_weights as tests

    patch.setattr(tests, "search_weights", weights.search_weights)


@bug(TRANSFER + "test_equal_domains_are_zero_apart_only_without_the_own_component[64-36.6]")
def a_point_counts_its_own_component(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, jnp, "eye")
    def eye(right, n, *args, **named):
        return 0 * right(n, *args, **named)


@bug(TRANSFER + "test_an_affine_change_of_sensors_is_found")
def the_encoder_is_left_as_it_was(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(adapt, "_placed", lambda start, map: start)


@bug(TRANSFER + "test_the_flow_of_a_linear_change_is_its_inverse[turned]")
def the_flow_leads_from_the_action_to_the_plan(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, action_flow, "matching_error")
    def error(right, flow, cond, x0, x1, t):
        return right(flow, cond, x1, x0, t)


@bug(TRANSFER + "test_only_the_flow_that_is_given_the_plan_reverses_an_action")
def the_plan_is_never_given(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, action_flow.Transformed, "condition")
    def condition(right, self, obs, plan):
        return right(self, obs, jnp.zeros_like(plan))
