"""In what acts outside training: real-time chunking and the delayed control loop."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from tests.planted import bug, wrong

from contraflow.agents.offline import bc
from contraflow.policy import composed, realtime
from contraflow.runtime.asynchronous import Asynchronous
from contraflow.runtime.delayed import Delayed, Plans

REALTIME = "policy/test_realtime.py::"
DELAYED = "runtime/test_delayed.py::"
ASYNCHRONOUS = "runtime/test_asynchronous.py::"


@bug(REALTIME + "test_the_chunk_begins_with_what_is_executed_meanwhile")
def a_resumed_chunk_begins_as_the_flow_likes(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, realtime.RealTime, "resume")
    def resume(right, self, obs, previous, left, delay, key, greedy=True):
        return right(self, obs, previous, left, 0, key, greedy)


@bug(REALTIME + "test_without_a_previous_chunk_it_is_the_policy")
def zeros_are_taken_for_a_previous_chunk(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, realtime, "overlap_weights")
    def weights(right, soft, horizon, known, left):
        return right(soft, horizon, known, horizon)


@bug(REALTIME + "test_weights_of_the_overlap")
def weights_of_the_overlap_do_not_end_with_it(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, realtime, "overlap_weights")
    def weights(right, soft, horizon, known, left):
        return right(soft, horizon, known, jnp.maximum(left, 1))


@bug(REALTIME + "test_guidance_is_exact_for_independent_actions_of_its_deviation")
def guidance_pulls_the_noisy_chunk(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, realtime, "_pulled")
    def pulled(right, flow, goal, weight, rule):
        return replace(right(flow, goal, weight, rule), at="state")

    import tests.policy.test_realtime as tests

    patch.setattr(tests, "_pulled", realtime._pulled)


@bug(REALTIME + "test_how_far_guidance_is_from_the_conditional_gaussian")
def guidance_never_uses_the_jacobian(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, realtime, "_pulled")
    def pulled(right, flow, goal, weight, rule):
        return right(flow, goal, weight, replace(rule, jacobian=False))

    import tests.policy.test_realtime as tests

    patch.setattr(tests, "_pulled", realtime._pulled)


@bug(REALTIME + "test_a_given_prefix_leads_to_the_conditional_gaussian")
def the_network_sees_a_noisy_prefix(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, realtime._Given, "__call__")
    def call(right, self, x, t, cond):
        return right(replace(self, goal=t * self.goal), x, t, cond)


@bug(REALTIME + "test_a_given_prefix_leads_to_the_conditional_gaussian")
def a_given_prefix_has_the_time_of_the_rest(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, realtime._Given, "__call__")
    def call(right, self, x, t, cond):
        given = jnp.repeat(self.given, self.dim // self.given.shape[0])
        v = self.flow.output(jnp.where(given, self.goal, x), t, cond)
        return jnp.where(given, (self.goal - x) / jnp.maximum(1.0 - t, 1e-3), v)


@bug("agents/test_bc.py::test_a_given_prefix_by_hand")
def a_given_prefix_counts_in_the_loss(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, bc.jnp, "repeat")
    def repeat(right, x, *args, **named):
        return right(x & False if x.dtype == bool else x, *args, **named)


@bug(DELAYED + "test_switching_leaves_out_what_is_late")
def a_late_chunk_begins_with_its_first_action(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Delayed, "_arrive")
    def arrive(right, self):
        here = self._wait == 0
        self._coming[here] = np.roll(self._coming[here], self._delay, 1)
        right(self)


@bug(DELAYED + "test_what_is_resumed_begins_now")
def the_previous_chunk_is_not_shifted(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Delayed, "_infer")
    def infer(right, self, obs, explore):
        for _ in range(int(self._age[0]) if self._delay and self._known.known.any() else 0):
            self._known._total = np.roll(self._known._total, 1, 1)
        return right(self, obs, explore)


@bug(DELAYED + "test_ensembling_equal_plans_gives_the_plan")
def ensembled_plans_are_added(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Plans, "actions", property(lambda self: self._total.copy()))


@bug(DELAYED + "test_copies_begin_episodes_at_other_times")
def a_chunk_of_the_last_episode_still_arrives(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Delayed, "reset")
    def reset(right, self, copies=slice(None)):
        right(self, copies)
        self._fresh[copies] = False


@bug(DELAYED + "test_episodes_are_counted_once")
def a_policy_that_waits_is_not_seen_to_stall(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Delayed, "stalled", property(lambda self: np.zeros(len(self._age), bool)))


@bug("policy/test_composed.py::test_either_of_two_is_their_mixture")
def alternatives_are_averaged(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, composed.Composed, "_end")
    def end(right, self, flows, conds, x0):
        return right(replace(self, rule="convex"), flows, conds, x0)


@bug("policy/test_composed.py::test_a_wide_and_a_narrow_one_around_the_same_point")
def densities_are_tracked_without_the_divergence(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, composed, "_with_divergence")
    def velocity(right, flow, x, t, cond):
        return flow.velocity(x, t, cond), jnp.zeros(())


@bug("policy/test_composed.py::test_all_the_weight_is_the_parent")
def all_parents_see_observations_as_the_first(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, composed.Composed, "__call__")
    def act(right, self, obs, key, greedy=True):
        stats = self.policies[0].stats
        return right(replace(self, policies=tuple(replace(p, stats=stats) for p in self.policies)), obs, key, greedy)


@bug("policy/test_composed.py::test_what_a_sum_of_fields_is_and_is_not")
def agreement_forgets_the_noise(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, composed.Composed, "_end")
    def end(right, self, flows, conds, x0):
        return right(replace(self, rule="convex"), flows, conds, x0)


@bug(ASYNCHRONOUS + "test_a_delay_of_two_steps_is_that_of_the_simulated_loop")
def a_chunk_of_the_thread_begins_with_its_first_action(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Asynchronous, "_collect")
    def collect(right, self, wait=False):
        begun, self._begun = self._begun, self._step
        right(self, wait)
        self._begun = begun


@bug(ASYNCHRONOUS + "test_a_worker_that_hangs_stalls_the_robot_by_rule")
def a_stalled_robot_goes_on(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Asynchronous, "__call__")
    def call(right, self, obs):
        late, self._late = self._late, "repeat"
        action = right(self, obs)
        self._late = late
        return action


@bug(ASYNCHRONOUS + "test_what_is_resumed_is_what_will_be_carried_out")
def no_delay_is_expected(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Asynchronous, "_begin")
    def begin(right, self, obs):
        self._most = 0
        right(self, obs)
