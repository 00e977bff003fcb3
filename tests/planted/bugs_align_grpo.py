"""Bugs in the GRPO family."""

from dataclasses import replace

import jax.numpy as jnp
from tests.planted import bug, wrong

from contraflow.agents.align import flow_grpo
from contraflow.flow import plan
from contraflow.rl import group

GRPO = "agents/align/test_flow_grpo.py"


@bug(f"{GRPO}::test_the_gradient_of_the_divergence")
def steps_do_not_pay_for_what_they_make_later_steps_pay(patch):
    @wrong(patch, flow_grpo.FlowGRPO, "_credit")
    def credit(right, self, scored, steps, reference):
        return right(replace(self, kl_to_go=False), scored, steps, reference)


@bug(f"{GRPO}::test_the_mean_ratio_is_one_with_sums_and_less_with_means")
def densities_are_means_over_coordinates(patch):
    @wrong(patch, flow_grpo.FlowGRPO, "_reduce")
    def reduce(right, self, x):
        return jnp.mean(x, -1)


@bug(f"{GRPO}::test_a_guarded_ratio_is_centred_with_the_size_of_the_move")
def the_guard_leaves_the_mean_of_the_ratio(patch):
    @wrong(patch, flow_grpo.FlowGRPO, "log_ratio")
    def log_ratio(right, self, steps, mean):
        log, moved = right(self, steps, mean)
        return log - steps.std * moved, moved


@bug(f"{GRPO}::test_the_guard_weighs_the_steps_of_flow_grpo_by_their_noise")
def the_guard_does_not_weigh_steps_by_their_length(patch):
    @wrong(patch, flow_grpo.FlowGRPO, "_weights")
    def weights(right, self, std):
        return jnp.ones_like(std)


@bug(f"{GRPO}::test_weights_by_noise_have_mean_one")
def weights_by_noise_are_not_normalised(patch):
    @wrong(patch, flow_grpo.FlowGRPO, "_weights")
    def weights(right, self, std):
        return std


@bug(f"{GRPO}::test_children_are_compared_with_each_other")
def children_are_compared_with_the_whole_condition(patch):
    @wrong(patch, flow_grpo.FlowGRPO, "_credit")
    def credit(right, self, scored, steps, reference):
        return right(replace(self, group="condition"), scored, steps, reference)


@bug(f"{GRPO}::test_the_gradient_stays_in_the_window")
def a_sweeping_window_stays_where_it_is(patch):
    @wrong(patch, plan.Plan, "start")
    def start(right, self, iteration, key):
        return jnp.zeros((), jnp.int32)


@bug(f"{GRPO}::test_the_gradient_of_a_shared_step_is_the_mean_over_its_leaves")
def a_sample_is_part_of_its_own_baseline(patch):
    @wrong(patch, group.GroupAdvantage, "__call__")
    def call(right, self, reward, weights):
        return right(self, reward, weights) * (1 - 1 / reward.shape[1])


@bug(f"{GRPO}::test_the_exponential_utility_reaches_the_tilt_and_the_plain_one_does_not")
def the_utility_of_ddrl_is_the_reward(patch):
    patch.setattr(group, "exponential", lambda z: z)


@bug("flow/test_flow_plan.py::test_a_scale_multiplies_the_level")
def deeper_noise_leaves_the_mean_of_its_step(patch):
    @wrong(patch, plan.FlowSDE, "__call__")
    def call(right, self, x, v, t, h, scale=1.0):
        mean, std = right(self, x, v, t, h)
        return mean, scale * std
