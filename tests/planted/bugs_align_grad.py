"""Bugs in methods that use gradients of rewards, posterior means of a pretrained flow, or steer it while it samples."""

from dataclasses import replace

from tests.planted import bug, wrong

from contraflow.agents.align import adjoint_matching, rfm_align
from contraflow.flow import adjoint
from contraflow.policy import searched

ADJOINT = "agents/align/test_adjoint_matching.py"
RFM = "agents/align/test_rfm_align.py"
SEARCHED = "policy/test_searched.py"


@bug(f"{ADJOINT}::test_a_linear_reward_shifts_the_mean")
def the_gradient_of_the_reward_is_not_divided_by_lambda(patch):
    @wrong(patch, adjoint_matching, "lean_adjoint")
    def lean(right, base, xs, slope, running=None):
        return right(base, xs, 0.5 * slope, running)


@bug(f"{ADJOINT}::test_the_optimum_of_a_running_cost")
def the_running_cost_counts_once_for_all_steps(patch):
    @wrong(patch, adjoint, "lean_adjoint")
    def lean(right, base, xs, slope, running=None):
        return right(base, xs, slope, None if running is None else lambda x, t: running(x, t) / (len(xs) - 1))

    patch.setattr(adjoint_matching, "lean_adjoint", adjoint.lean_adjoint)


@bug(f"{ADJOINT}::test_steps_are_chosen_from_all_parts_of_a_path")
def only_early_steps_of_a_path_are_matched(patch):
    @wrong(patch, adjoint_matching.AdjointMatching, "chosen")
    def chosen(right, self, key):
        return right(self, key) // 2


@bug(f"{RFM}::test_candidates_are_draws_of_the_end_given_the_state")
def candidates_are_ends_of_the_ode(patch):
    @wrong(patch, rfm_align, "Ancestral")
    def ancestral(right, eta):
        return right(0.1)


@bug(f"{RFM}::test_the_policy_may_be_an_average_of_weights")
def the_average_of_weights_does_not_act(patch):
    @wrong(patch, rfm_align.RFMAlign, "policy")
    def policy(right, self, state):
        return right(self, replace(state, old=None))


@bug(f"{RFM}::test_weights_make_few_particles_exact_and_equal_ones_do_not")
def the_covariance_of_a_few_particles_is_too_small(patch):
    @wrong(patch, rfm_align, "estimate")
    def estimate(right, ends, log_w, mean):
        found, *more = right(ends, log_w, mean)
        return mean + (1 - 1 / len(ends)) * (found - mean), *more

    from tests.agents.align import test_rfm_align

    patch.setattr(test_rfm_align, "estimate", rfm_align.estimate)


@bug(f"{RFM}::test_between_gaussians_it_learns_the_tilt")
def rewards_are_not_divided_by_lambda(patch):
    @wrong(patch, rfm_align, "estimate")
    def estimate(right, ends, log_w, mean):
        return right(ends, 0.5 * log_w, mean)


@bug(f"{SEARCHED}::test_the_error_of_an_inversion_shrinks_by_one_minus_rate_s")
def an_inversion_starts_over_at_each_iteration(patch):
    @wrong(patch, searched, "search")
    def search(right, sampler, slope, z, rate, iterations):
        return right(sampler, slope, z, rate, min(iterations, 1))
