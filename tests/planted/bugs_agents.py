"""In agents, online, on-policy and offline, and in the policies that they put together."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from tests.planted import bug, wrong

from contraflow.agents.offline import fql, iql
from contraflow.agents.offline.bc import BC
from contraflow.agents.offline.fql import FQL
from contraflow.agents.offline.iql import IQL, Regressed
from contraflow.agents.offline.qc import QC
from contraflow.agents.online import dacer, pmd, rfm, sac
from contraflow.agents.online.pmd import PMD
from contraflow.agents.online.rfm import RFM
from contraflow.agents.online.sac import SAC
from contraflow.agents.online.td3 import TD3
from contraflow.agents.onpolicy import dppo, fpo, reinflow
from contraflow.agents.onpolicy.dppo import DPPO
from contraflow.agents.onpolicy.fpo import FPO, MatchedFlow
from contraflow.data import samplers
from contraflow.flow.model import Flow
from contraflow.nets.critic import QEnsemble
from contraflow.policy import best_of
from contraflow.policy.best_of import BestOf
from contraflow.policy.normalise import RunningMoments
from contraflow.rl import normalise, ppo
from contraflow.rl.critics import Critics
from contraflow.rl.normalise import ReturnScale

PPO = "agents/test_ppo.py::"
PMD_TESTS = "agents/test_pmd.py::"
RFM_TESTS = "agents/test_rfm.py::"
FQL_TESTS = "agents/test_fql.py::"
IQL_TESTS = "agents/test_iql.py::"
QC_TESTS = "agents/test_qc.py::"
REBRAC_TESTS = "agents/test_rebrac.py::"
OBS = "agents/test_normalise_obs.py::"


@bug(PPO + "test_dppo_discounts_the_steps_before_the_last")
def dppo_discounts_the_last_denoising_steps(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, dppo, "clipped")
    def clipped(right, log_ratio, advantage, clip):
        return right(log_ratio, advantage[::-1], clip)


@bug("agents/test_pretrained.py::test_what_dppo_does_not_learn_stays_as_it_was")
def dppo_begins_with_the_network_that_learns(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, DPPO, "_denoiser")
    def denoiser(right, self, actor, reference):
        return right(self, actor, actor)


@bug(PPO + "test_fpo_weighs_by_the_error_of_the_noise")
def fpo_weighs_by_the_mirrored_time(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, MatchedFlow, "losses")
    def losses(right, self, obs, end, t, noise):
        return right(self, obs, end, t, noise) * ((1 - t) / t) ** 2


@bug(PPO + "test_the_share_that_the_critic_explains")
def the_explained_variance_counts_dummy_rows(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, ppo, "weighted_mean")
    def weighted_mean(right, x, weight):
        return right(x, jnp.ones_like(weight))


@bug(PPO + "test_aspo_pulls_back_what_became_too_unlikely")
def aspo_pulls_back_what_became_too_likely(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, fpo, "aspo")
    def aspo(right, log_ratio, advantage, clip):
        return right(log_ratio, -advantage, clip)


@bug(PPO + "test_fpo_plus_plus_with_one_pair_and_gains_is_fpo", PPO + "test_aspo_pulls_back_what_became_too_unlikely")
def aspo_penalises_gains_too(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, fpo, "aspo")
    def aspo(right, log_ratio, advantage, clip):
        ratio = jnp.exp(log_ratio)
        return -advantage * ratio + jnp.abs(advantage) * (ratio - 1) ** 2 / (2 * clip)


@bug(PPO + "test_each_pair_has_a_trust_region_of_its_own")
def pairs_share_the_ratio_of_their_mean(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, FPO, "_surrogate")
    def surrogate(right, self, *args):
        return right(replace(self, per_pair=False), *args)


@bug(PPO + "test_a_pair_beyond_the_cap_is_left_alone")
def the_cap_is_not_applied(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, MatchedFlow, "losses")
    def losses(right, self, *args):
        return right(replace(self, cap=None), *args)


@bug(PPO + "test_reinflow_with_one_step_is_gaussian_ppo")
def the_better_of_the_clipped_and_the_unclipped(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, reinflow, "clipped")
    def clipped(right, log_ratio, advantage, clip):
        return -right(log_ratio, -advantage, clip)


@bug(PPO + "test_dummy_rows_have_no_part_in_advantages")
def the_deviation_of_advantages_counts_dummy_rows(patch: pytest.MonkeyPatch) -> None:
    from contraflow.rl import advantage

    @wrong(patch, advantage, "normalise")
    def moments(right, x, weight):
        mean = jnp.sum(weight * x) / weight.sum()
        return (x - mean) / (jnp.std(x) + 1e-8)


@bug(PPO + "test_what_dummy_rows_hold_changes_nothing[ppo]")
def dummy_rows_of_a_rollout_are_learned_from(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, ppo, "weighted_mean")
    def mean(right, x, weight):
        return x.mean()


@bug(PPO + "test_what_an_update_learns_from")
def a_rollouts_ends_are_swapped(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, ppo, "gae")
    def gae(right, reward, value, following, terminated, truncated, gamma, lam):
        return right(reward, value, following, truncated, terminated, gamma, lam)


@bug(PPO + "test_what_an_update_learns_from")
def values_are_those_of_raw_observations(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, ppo, "normalise_obs")
    def seen(right, stats, obs):
        return obs


@bug(PPO + "test_passes_go_over_all_rows_in_new_orders")
def every_pass_has_the_same_order(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, ppo, "passes")
    def passes(right, step, nets, data, key, count, *rest):
        for _ in range(count):
            nets, metrics = right(step, nets, data, jax.random.clone(key), 1, *rest)
        return nets, metrics | {"updates": count * metrics["updates"]}


@bug(PPO + "test_passes_end_once_the_policy_has_moved_too_far")
def passes_never_end_early(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, ppo, "passes")
    def passes(right, step, nets, data, key, count, minibatches, target_kl=None):
        return right(step, nets, data, key, count, minibatches)


@bug(PPO + "test_the_scale_of_rewards_is_that_of_returns_within_episodes")
def the_scale_of_rewards_runs_on_across_episodes(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, ReturnScale, "update")
    def update(right, self, reward, done, valid, gamma):
        return right(self, reward, jnp.zeros_like(done), valid, gamma)


@bug(OBS + "test_two_pieces_make_one_whole")
def the_gap_of_two_means_counts_once(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, RunningMoments, "update")
    def update(right, self, rows, valid):
        new, n = right(self, rows, valid), valid.sum()
        gap = (new.mean - self.mean) * new.count / n
        excess = gap**2 * (self.count - 1.0) * n / new.count**2
        return replace(new, var=new.var - excess)


@bug(OBS + "test_statistics_are_those_of_the_rows_replayed")
def successors_are_in_other_units_than_states(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, normalise, "update_and_normalise")
    def both(right, stats, batch, mode):
        stats, seen = right(stats, batch, mode)
        return stats, replace(seen, next_obs=batch.next_obs)


@bug(OBS + "test_scale_and_offset_do_not_matter[sac]")
def statistics_do_not_reach_the_actions(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, sac, "normalised")
    def policy(right, stats, policy):
        return policy


@bug(PMD_TESTS + "test_the_backup_chooses_by_the_target")
def pmd_chooses_by_the_online_critic_in_the_backup(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, PMD, "update")
    def update(right, self, state, batch, key):
        with patch.context() as inside:
            inside.setattr(pmd, "BestOf", lambda policy, critic, *rest: BestOf(policy, state.critic, *rest))
            return right(self, state, batch, key)


@bug("agents/test_td3.py::test_targets_are_smoothed_and_made_by_the_slow_copy")
def td3_makes_targets_by_the_network_that_learns(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, TD3, "update")
    def update(right, self, state, batch, key):
        return right(self, replace(state, slow=state.actor), batch, key)


@bug("agents/test_td3.py::test_the_actor_waits")
def td3_moves_its_actor_too_early(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, TD3, "update")
    def update(right, self, state, batch, key):
        new, metrics = right(self, replace(state, step=state.step + 1), batch, key)
        return replace(new, step=state.step + 1), metrics


@bug("agents/test_sac.py::test_backup_subtracts_the_entropy_cost")
def sac_adds_the_cost_of_entropy_in_the_backup(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Critics, "learn")
    def learn(right, self, critic, target, opt, batch, action, key, bonus=0.0):
        return right(self, critic, target, opt, batch, action, key, -bonus)


@bug("agents/test_sac.py::test_log_prob_is_the_density_of_the_action")
def the_density_of_a_squashed_action_has_the_inverse_jacobian(patch: pytest.MonkeyPatch) -> None:
    from contraflow.policy import gaussian

    @wrong(patch, gaussian, "log_sech2")
    def jacobian(right, u):
        return -right(u)


@bug("agents/test_sac.py::test_default_target_entropy_is_minus_the_action_dimension")
def sac_cools_where_there_is_too_little_entropy(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, SAC, "update")
    def update(right, self, state, batch, key):
        new, metrics = right(self, state, batch, key)
        return replace(new, log_alpha=2 * state.log_alpha - new.log_alpha), metrics


@bug(PMD_TESTS + "test_the_backup_chooses_by_the_target")
def the_backup_asks_the_online_critic(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Critics, "learn")
    def learn(right, self, critic, *rest, **named):
        with patch.context() as inside:

            @wrong(inside, Critics, "td_targets")
            def targets(asked, self, target, *args):
                return asked(self, critic, *args)

            return right(self, critic, *rest, **named)


@bug(RFM_TESTS + "test_update_against_an_independent_one[policy]")
def rfm_estimates_by_the_critic_before_its_update(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, RFM, "update")
    def update(right, self, state, batch, key):
        with patch.context() as inside:

            @wrong(inside, RFM, "log_pi")
            def log_pi(asked, self, critic, obs, lam):
                return asked(self, state.critic, obs, lam)

            return right(self, state, batch, key)


@bug(RFM_TESTS + "test_update_against_an_independent_one[soft]")
def rfm_pays_for_entropy_in_a_soft_backup(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, rfm, "action_log_prob")
    def log_prob(right, *args):
        return -right(*args)


@bug(RFM_TESTS + "test_update_adds_matching_and_ties_and_moves_the_copy")
def a_network_that_is_its_own_teacher(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, rfm, "consistency_error")
    def tie(right, objective, flow, slow, *rest, **named):
        return right(objective, flow, flow, *rest, **named)


@bug("agents/test_dacer.py::test_an_end_beyond_the_box_comes_back_and_goes_no_further")
def no_gradient_beyond_the_box(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dacer, "into_box", lambda end: jnp.clip(end, -1.0, 1.0))


@bug(FQL_TESTS + "test_the_loss_of_the_actor_by_hand")
def fql_goes_down_the_value(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, QEnsemble, "value")
    def value(right, self, obs, action):
        return -right(self, obs, action)


@bug(FQL_TESTS + "test_the_loss_of_the_actor_by_hand[end]")
def the_teacher_of_fql_sees_other_noise(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, FQL, "update")
    def update(right, self, state, batch, key):
        with patch.context() as inside:

            @wrong(inside, Flow, "sample")
            def sample(solved, self, x0, *rest):
                return solved(self, -x0, *rest)

            return right(self, state, batch, key)


@bug(FQL_TESTS + "test_masked_actions_are_neither_cloned_nor_distilled")
def fql_clones_what_is_masked(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, FQL, "update")
    def update(right, self, state, batch, key):
        return right(self, state, replace(batch, mask=jnp.ones_like(batch.mask)), key)


@bug(FQL_TESTS + "test_targets_are_those_of_the_actor_at_the_successor")
def fql_backs_up_the_cloned_flow(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, FQL, "update")
    def update(right, self, state, batch, key):
        with patch.context() as inside:

            @wrong(inside, fql.OneStep, "__call__")
            def act(_, actor, obs, key, greedy=True):
                return state.flow.action(state.flow.sample(state.flow.noise(key), obs))

            return right(self, state, batch, key)


@bug("agents/test_bc.py::test_the_loss_by_hand[velocity]")
def masked_numbers_are_imitated(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, BC, "update")
    def update(right, self, state, batch, key):
        return right(self, state, replace(batch, mask=jnp.ones_like(batch.mask)), key)


@bug("agents/test_bc.py::test_one_update[Matching]")
def the_average_forgets_what_it_should_keep(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, BC, "update")
    def update(right, self, state, batch, key):
        new, metrics = right(self, state, batch, key)
        swapped = jax.tree.map(lambda a, b, c: a + b - c, state.average, new.flow, new.average)
        return eqx.tree_at(lambda s: s.average, new, swapped), metrics


@bug("policy/test_policies.py::test_particles_are_picked_by_their_value_over_the_temperature")
def actions_are_picked_as_if_it_were_colder(patch: pytest.MonkeyPatch) -> None:
    for module in (best_of, rfm):

        @wrong(patch, module, "pick")
        def pick(right, selector, key, critic, obs, actions, lam):
            return right(selector, key, critic, obs, actions, lam**2)


@bug("policy/test_policies.py::test_exploring_and_greedy_follow_their_own_rules")
def policies_explore_by_the_greedy_rule(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, BestOf, "__call__")
    def act(right, self, obs, key, greedy=True):
        return right(self, obs, key, not greedy)


@bug(IQL_TESTS + "test_values_are_expectiles_over_the_actions_of_the_data[0.9]")
def expectiles_lean_towards_the_worst(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, iql, "expectile_loss")
    def loss(right, error, kappa):
        return right(error, 1 - kappa)


@bug(IQL_TESTS + "test_a_critic_learns_what_the_value_of_the_successor_says")
def iql_discounts_the_value_of_the_successor_twice(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, IQL, "update")
    def update(right, self, state, batch, key):
        return right(self, state, replace(batch, discount=batch.discount**2), key)


@bug(IQL_TESTS + "test_the_regressed_actor_is_the_weighted_normal")
def weights_of_a_regression_have_no_cap(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Regressed, "loss")
    def loss(right, self, actor, batch, advantage, key):
        return right(replace(self, cap=1e9), actor, batch, advantage, key)


@bug(IQL_TESTS + "test_the_best_of_n_of_a_normal_base[32]")
def the_worst_of_n_is_taken(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, best_of, "pick")
    def pick(right, selector, key, critic, obs, actions, lam):
        return jnp.argmin(jax.vmap(lambda a: critic.value(obs, a))(actions))


@bug(QC_TESTS + "test_targets_value_the_chunk_that_the_critics_choose")
def targets_choose_the_chunk_that_they_value(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, QC, "update")
    def update(right, self, state, batch, key):
        with patch.context() as inside:

            @wrong(inside, QC, "_best")
            def best(found, self, state):
                return found(self, replace(state, critic=state.target))

            return right(self, state, batch, key)


@bug(QC_TESTS + "test_chunks_are_valued_exactly_where_several_steps_are_not")
def a_chunk_is_discounted_as_one_step(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, samplers, "_follow")
    def follow(right, rows, first, steps, gamma):
        *found, discount = right(rows, first, steps, gamma)
        return *found, jnp.where(discount > 0, gamma, 0.0)


@bug(REBRAC_TESTS + "test_targets_pay_for_the_distance_from_what_the_data_do_next")
def rebrac_compares_the_next_action_with_the_last(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, TD3, "update")
    def update(right, self, state, batch, key):
        return right(self, state, replace(batch, next_action=batch.action), key)


@bug(REBRAC_TESTS + "test_targets_pay_for_the_distance_from_what_the_data_do_next")
def rebrac_makes_up_actions_beyond_the_end(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, TD3, "update")
    def update(right, self, state, batch, key):
        known = None if batch.next_mask is None else jnp.ones_like(batch.next_mask)
        return right(self, state, replace(batch, next_mask=known), key)


@bug(REBRAC_TESTS + "test_the_actor_weighs_the_data_against_a_quadratic_value")
def rebrac_is_held_to_the_data_half_as_much(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, TD3, "update")
    def update(right, self, state, batch, key):
        return right(replace(self, actor_penalty=0.5 * self.actor_penalty), state, batch, key)


@bug("data/test_samplers.py::test_the_next_action_is_what_the_same_trajectory_did_next")
def the_next_action_is_that_of_the_next_row(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, samplers, "_batch")
    def batch(right, rows, first, last, *rest):
        found = right(rows, first, last, *rest)
        after = rows.action[jnp.minimum(last + 1, rows.reward.shape[0] - 1)]
        size = after.shape[1]
        mask = jnp.ones_like(found.next_mask[:, :size])
        join = lambda head, tail: jnp.concatenate([head, tail[:, size:]], 1)
        return replace(found, next_action=join(after, found.next_action), next_mask=join(mask, found.next_mask))


@bug(FQL_TESTS + "test_what_each_anchor_makes_of_normal_data")
def the_anchor_looks_from_the_other_end(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, fql, "matching_error")
    def error(right, flow, obs, x0, x1, t):
        return right(flow, obs, x0, jax.lax.stop_gradient(x1), 1 - t) * (2 - t)


@bug(FQL_TESTS + "test_guidance_clones_the_better_rows")
def guidance_clones_the_worse_rows(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, fql, "cloning_loss")
    def loss(right, flow, batch, key, weight=None):
        return right(flow, batch, key, None if weight is None else 1 - weight)
