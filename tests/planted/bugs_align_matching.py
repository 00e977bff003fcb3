"""Bugs in the methods of alignment that learn from fresh (t, x0) by matching."""

import jax
import jax.numpy as jnp
from tests.planted import bug, wrong

from contraflow.agents.align import ac_flow, awm, flow_dpo, nft, rwr

HERE = "agents/align/test_matching_"
FIRST = f"{HERE}identities.py::test_first_gradients_are_one_vector"


@bug(f"{HERE}nft.py::test_optimum_for_linear_rewards", f"{HERE}nft.py::test_optimum_at_a_point")
def good_and_bad_samples_change_places_in_nft(patch):
    @wrong(patch, nft.NFT, "update")
    def update(right, self, state, scored, key):
        return right(self, state, nft.replace(scored, reward=-scored.reward), key)


@bug(FIRST, f"{HERE}nft.py::test_optimum_for_linear_rewards")
def the_error_of_nft_is_that_of_x1_without_its_scale(patch):
    @wrong(patch, nft.NFT, "_error")
    def error(right, self, v, u, t):
        return (1 - t) ** 2 * right(self, v, u, t)


@bug(f"{HERE}nft.py::test_the_implied_velocity_is_that_of_the_flow")
def the_derivative_of_an_average_velocity_has_the_wrong_sign(patch):
    @wrong(patch, nft, "implied")
    def implied(right, flow, old, cond, x, t, r, along):
        return 2 * flow.average(x, t, r, cond) - right(flow, old, cond, x, t, r, along)


@bug(f"{HERE}nft.py::test_optimum_of_average_velocities")
def mean_flow_nft_takes_the_average_for_the_velocity(patch):
    @wrong(patch, nft, "implied")
    def implied(right, flow, old, cond, x, t, r, along):
        return flow.average(x, t, r, cond)


@bug(f"{HERE}nft.py::test_steps_of_no_length_are_nft")
def no_step_of_mean_flow_nft_has_no_length(patch):
    @wrong(patch, nft, "implied")
    def implied(right, flow, old, cond, x, t, r, along):
        return right(flow, old, cond, x, t, jnp.ones_like(r), along)


@bug(f"{HERE}contract.py::test_flows_of_the_other_kind_are_refused")
def averaged_flows_are_not_refused(patch):
    for module in (awm, rwr, ac_flow, flow_dpo, nft):
        wrong(patch, module, "checked_flow")(lambda right, spec, *rest: spec)


@bug(FIRST, f"{HERE}awm.py::test_equal_advantages_are_pretraining")
def awm_weighs_by_the_size_of_the_advantage(patch):
    @wrong(patch, awm.AWM, "update")
    def update(right, self, state, scored, key):
        class Sizes(type(self.advantage)):
            def __call__(self, reward, weights):
                return jnp.abs(super().__call__(reward, weights))

        given = Sizes(self.advantage.std, self.advantage.separate, self.advantage.clip)
        return right(awm.replace(self, advantage=given), state, scored, key)


@bug(f"{HERE}awm.py::test_the_elbo_is_tight_for_gaussians")
def the_bound_of_awm_is_weighted_by_t_alone(patch):
    @wrong(patch, awm.AWM, "_error")
    def error(right, self, error, t):
        return error * t if self.weight == "elbo" else right(self, error, t)


@bug(f"{HERE}identities.py::test_second_order", f"{HERE}awm.py::test_the_slow_flow_holds_the_flow_back")
def awm_has_no_trust(patch):
    @wrong(patch, awm.AWM, "update")
    def update(right, self, state, scored, key):
        return right(awm.replace(self, trust=0.0), state, scored, key)


@bug(f"{HERE}rwr.py::test_iterates_tilt_the_first_distribution")
def weights_have_half_the_temperature(patch):
    @wrong(patch, rwr.RWR, "weights")
    def weights(right, self, scored):
        return right(rwr.replace(self, temperature=self.temperature / 2), scored)


@bug(f"{HERE}rwr.py::test_the_anchored_minimum")
def the_anchor_is_the_flow_itself(patch):
    @wrong(patch, rwr.RWR, "update")
    def update(right, self, state, scored, key):
        copy = jax.tree.map(jnp.copy, state.flow)
        new, metrics = right(self, rwr.replace(state, reference=copy), scored, key)
        return rwr.replace(new, reference=state.reference), metrics


@bug(f"{HERE}ac_flow.py::test_the_critic_learns_the_mean_reward_of_what_a_noisy_sample_becomes")
def the_critic_does_not_see_the_time(patch):
    @wrong(patch, ac_flow, "time_embedding")
    def embedding(right, t, size):
        return 0.0 * right(t, size)


@bug(f"{HERE}ac_flow.py::test_the_warm_up_leaves_the_flow")
def the_warm_up_trains_the_flow(patch):
    @wrong(patch, ac_flow.ACFlow, "update")
    def update(right, self, state, scored, key):
        return right(ac_flow.replace(self, warmup=0), state, scored, key)


@bug(f"{HERE}ac_flow.py::test_the_critic_leaves_the_minimum")
def the_weights_of_ac_flow_have_half_the_temperature(patch):
    @wrong(patch, ac_flow.ACFlow, "update")
    def update(right, self, state, scored, key):
        return right(ac_flow.replace(self, temperature=self.temperature / 2), state, scored, key)


@bug(f"{HERE}dpo.py::test_small_beta_matches_the_winner_and_unmatches_the_loser")
def the_worst_sample_wins(patch):
    @wrong(patch, flow_dpo.FlowDPO, "update")
    def update(right, self, state, scored, key):
        return right(self, state, flow_dpo.replace(scored, reward=-scored.reward), key)


@bug(f"{HERE}dpo.py::test_the_loss_is_that_of_the_margins")
def preferences_forget_the_reference(patch):
    @wrong(patch, flow_dpo.FlowDPO, "update")
    def update(right, self, state, scored, key):
        return right(self, flow_dpo.replace(state, reference=state.flow), scored, key)
