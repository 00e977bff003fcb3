"""In offline agents whose policies are guided by Q within their sampler."""

from dataclasses import replace

import jax
import pytest
from tests.planted import bug, wrong

from contraflow.agents.offline import dql
from contraflow.agents.offline.dql import DQL
from contraflow.flow import model
from contraflow.flow.model import Flow

DQL_TESTS = "agents/test_dql.py::"


@bug(DQL_TESTS + "test_the_actor_by_hand")
def dql_climbs_by_its_last_step_alone(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, model, "rollout")
    def rollout(right, kernel, x0, steps, key):
        held = lambda x, k: kernel(jax.lax.stop_gradient(x), k)
        return right(held, x0, steps, key)


@bug(DQL_TESTS + "test_the_actor_does_not_see_the_scale_of_its_critics")
def dql_divides_by_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dql.jax.lax, "stop_gradient", lambda x: 1.0 + 0.0 * x)


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
