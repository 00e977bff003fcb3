"""Bugs in the alignment of flows with rewards."""

import jax.numpy as jnp
from tests.planted import bug, wrong

from contraflow.flow import plan

PLAN = "flow/test_flow_plan.py"


@bug(f"{PLAN}::test_ends_have_the_distribution_of_the_ode")
def the_drift_of_a_noisy_step_has_half_the_score(patch):
    @wrong(patch, plan.FlowSDE, "__call__")
    def call(right, self, x, v, t, h, scale=1.0):
        mean, std = right(self, x, v, t, h, scale)
        return 0.5 * (mean + x + h * v), std


@bug(f"{PLAN}::test_trees_share_their_prefix")
def children_of_a_tree_do_not_branch(patch):
    @wrong(patch, plan.Plan, "step")
    def step(right, self, field, x, k, scale=1.0):
        mean, std = right(self, field, x, k, scale)
        return mean, 0.0 * std


@bug(f"{PLAN}::test_the_multistep_solver_is_of_second_order")
def the_multistep_solver_does_not_extrapolate(patch):
    @wrong(patch, plan, "multistep")
    def multistep(right, field, x, t, n):
        h = (1.0 - t) / n
        for k in range(int(n)):
            x = x + h * jnp.stack([field(row, t + k * h) for row in x])
        return x
