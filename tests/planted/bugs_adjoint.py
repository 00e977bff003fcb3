"""In adjoint matching and the agents that act by it or by edits."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from tests.planted import bug, wrong

from contraflow.agents.offline import qam
from contraflow.agents.offline.expo import EXPO
from contraflow.agents.offline.qam import QAM
from contraflow.flow import adjoint
from contraflow.policy import edit
from contraflow.policy.edit import AlsoEdited
from contraflow.policy.flow import FlowPolicy
from contraflow.rl.edits import Edits

ADJOINT = "flow/test_flow_adjoint.py::"
QAM_TESTS = "agents/test_qam.py::"
EXPO_TESTS = "agents/test_expo.py::"


@bug(ADJOINT + "test_the_adjoint_is_the_derivative_of_the_steps_of_the_base")
def the_base_of_an_adjoint_is_one_step_late(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, adjoint, "lean_adjoint")
    def lean_adjoint(right, base, xs, slope):
        h = 1 / (xs.shape[0] - 1)
        return right(lambda x, t: base(x, t + h), xs, slope)


@bug(ADJOINT + "test_the_fixed_point_in_steps")
def the_memoryless_noise_is_half_as_wide(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, adjoint, "sigma")
    def sigma(right, t, h=0.0):
        return 0.5 * right(t, h)


@bug(ADJOINT + "test_the_fixed_point_in_steps")
def the_adjoint_of_the_step_before(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, adjoint, "lean_adjoint")
    def lean_adjoint(right, base, xs, slope):
        found = right(base, xs, slope)
        return replace(found, adjoint=jnp.concatenate([found.adjoint[:1], found.adjoint[:-1]]))


@bug(QAM_TESTS + "test_the_loss_of_the_actor_by_hand")
def qam_goes_down_the_value(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, qam, "lean_adjoint")
    def lean_adjoint(right, base, xs, slope):
        return right(base, xs, -slope)


@bug(QAM_TESTS + "test_the_actor_becomes_behaviour_tilted_by_the_value")
def paths_of_qam_are_those_of_the_base(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, qam, "rollout")
    def rollout(right, fine, base, x0, steps, key):
        return right(base, base, x0, steps, key)


@bug(QAM_TESTS + "test_targets_are_those_of_the_policy_at_the_successor")
def qam_backs_up_the_actor_without_its_edit(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, QAM, "_acting")
    def acting(right, self, state):
        return right(self, replace(state, edit=None))


@bug(QAM_TESTS + "test_the_rule_of_a_budget")
def a_budget_that_heats_what_is_too_close(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, qam.Budget, "following")
    def following(right, self, lam, average, kl):
        new, average = right(self, lam, average, kl)
        return lam**2 / new, average


@bug(EXPO_TESTS + "test_edits_that_push_uphill_add_their_scale")
def edits_are_not_among_the_candidates(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, AlsoEdited, "particles")
    def particles(right, self, obs, key, n):
        return self.policy.particles(obs, key, n)


@bug(EXPO_TESTS + "test_edits_learn_at_the_actions_of_the_batch")
def edits_learn_at_the_actions_of_the_base(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, EXPO, "update")
    def update(right, self, state, batch, key):
        with patch.context() as inside:

            @wrong(inside, Edits, "learn")
            def learn(learned, edits, edit, value, obs, action, key):
                own = jax.vmap(FlowPolicy(state.average))(obs, jax.random.split(key, action.shape[0]))
                return learned(edits, edit, value, obs, own, jax.random.clone(key))

            return right(self, state, batch, key)


@bug("rl/test_rl_edits.py::test_the_temperature_of_an_edit")
def the_density_of_an_edit_forgets_tanh(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(edit, "log_sech2", jnp.zeros_like)


@bug("rl/test_rl_edits.py::test_an_entropy_out_of_reach_is_refused")
def an_entropy_counts_in_units_of_the_edit_always(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Edits, "target", property(lambda self: self.entropy))
