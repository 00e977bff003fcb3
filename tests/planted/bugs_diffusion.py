"""In offline agents whose policies are guided by Q within their sampler."""

from dataclasses import replace

import jax
import pytest
from tests.planted import bug, wrong

from contraflow.agents.offline import dac, dql, rql
from contraflow.agents.offline.dac import DAC
from contraflow.agents.offline.dql import DQL
from contraflow.agents.offline.rql import RQL
from contraflow.flow import model
from contraflow.flow.model import Flow
from contraflow.nets.critic import QEnsemble
from contraflow.rl.critics import Critics

DQL_TESTS = "agents/test_dql.py::"
DAC_TESTS = "agents/test_dac.py::"
RQL_TESTS = "agents/test_rql.py::"


@bug(DQL_TESTS + "test_the_actor_by_hand")
def dql_climbs_by_its_last_step_alone(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, model, "rollout")
    def rollout(right, kernel, x0, steps, key):
        held = lambda x, k: kernel(jax.lax.stop_gradient(x), k)
        return right(held, x0, steps, key)


@bug(DQL_TESTS + "test_the_actor_does_not_see_the_scale_of_its_critics")
def dql_divides_by_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dql, "unit_scale", lambda q: 1.0)


@bug(DQL_TESTS + "test_targets_are_the_least_of_what_each_critic_finds_best")
def dql_backs_up_the_actor_that_learns(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, DQL, "update")
    def update(right, self, state, batch, key):
        return right(self, replace(state, average=state.actor), batch, key)


@bug(DQL_TESTS + "test_the_sampler_of_a_gaussian_is_an_affine_recursion")
def ddpm_takes_the_noise_of_the_other_variance(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Flow, "denoising")
    def denoising(right, self, cond, solver):
        return right(self, cond, replace(solver, wide=not solver.wide))


@bug(DAC_TESTS + "test_the_minimiser_and_its_known_bias")
def dac_goes_down_the_value(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, QEnsemble, "value")
    def value(right, self, obs, action):
        return -right(self, obs, action)


@bug(DAC_TESTS + "test_the_minimiser_and_its_known_bias")
def dac_is_mended_in_silence(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, DAC, "update")
    def update(right, self, state, batch, key):
        with patch.context() as inside:

            @wrong(inside, dac.jax, "grad")
            def slope(differentiated, value, argnums=0):
                def exact(obs, x):
                    return 0.2 * differentiated(value, argnums=argnums)(obs, x)

                return exact if argnums else differentiated(value)

            return right(self, state, batch, key)


@bug(DAC_TESTS + "test_eta_moves_to_either_bound")
def dac_moves_eta_the_other_way(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, DAC, "update")
    def update(right, self, state, batch, key):
        new, metrics = right(self, state, batch, key)
        return replace(new, eta=2 * state.eta - new.eta), metrics


@bug(DAC_TESTS + "test_targets_are_a_lower_bound_of_what_each_critic_makes_of_ten[mean]")
def a_backup_takes_the_best_of_several_actions(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Critics, "learn")
    def learn(right, *args, over="mean"):
        return right(*args, over="max")


@bug(RQL_TESTS + "test_actions_are_taken_back_along_the_flow")
def rql_takes_actions_back_in_a_straight_line(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, rql, "reversed_flow")
    def back(right, flow, obs, action, way):
        return action - way * flow.velocity(action, 1.0 - 0.0 * way, flow.encode(obs))


@bug(RQL_TESTS + "test_targets_are_the_value_of_the_successor_and_fresh_noise")
def rql_takes_the_successors_noise_for_an_action(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, rql, "place")
    def place(right, x, f):
        return right(x, 1.0 - f)


@bug(RQL_TESTS + "test_the_flow_by_hand")
def rql_values_where_its_step_begins(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, RQL, "update")
    def update(right, self, state, batch, key):
        with patch.context() as inside:

            @wrong(inside, rql, "place")
            def place(asked, x, f):
                return asked(x, f - 1.0 / self.flow.solver.nfe)

            return right(self, state, batch, key)
