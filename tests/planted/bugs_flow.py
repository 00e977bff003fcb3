"""In flows and estimators of the posterior mean."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from tests.planted import bug, wrong

from contraflow.flow import fewstep, kernel
from contraflow.flow.coupling import ConditionalOT
from contraflow.flow.likelihood import Exact
from contraflow.flow.model import Flow
from contraflow.flow.path import VE, AbstractPath, Linear
from contraflow.flow.posterior import jump, starts, strata
from contraflow.flow.posterior.control import Fixed, MinVariance
from contraflow.flow.posterior.importance import Reverse
from contraflow.flow.posterior.local import Local
from contraflow.flow.solver import EulerMaruyama, RungeKutta
from contraflow.rl import energy

POSTERIOR = "flow/test_flow_posterior.py::"
MARKOV = "flow/test_flow_markov.py::"


@bug("flow/test_flow_path.py::test_ends")
def time_runs_backwards(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Linear, "alpha")
    def alpha(right, self, t):
        return 1.0 - t

    @wrong(patch, Linear, "beta")
    def beta(right, self, t):
        return t


@bug("flow/test_flow_path.py::test_ends")
def the_source_has_a_deviation_of_one_on_every_path(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(VE, "source_scale", 1.0)


@bug("flow/test_flow_path.py::test_every_conversion_to_every_other")
def a_score_that_points_away_from_the_data(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, AbstractPath, "score_from_velocity")
    def score(right, self, v, x_t, t):
        return -right(self, v, x_t, t)


@bug("flow/test_flow_path.py::test_every_conversion_to_every_other")
def the_end_of_a_velocity_without_the_drift_of_the_noise(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, AbstractPath, "x1_from_velocity")
    def x1(right, self, v, x_t, t):
        return self.beta(t) * v / self.wronskian(t)


@bug("flow/test_flow_matching.py")
def targets_have_gradients(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(jax.lax, "stop_gradient", lambda x: x)


@bug(POSTERIOR + "test_consistent")
def importance_weights_without_the_density_of_the_proposal(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Reverse, "_log_likelihood_ratio")
    def ratio(right, self, path, x, x_t, t, support):
        return jnp.zeros(x.shape[0])


@bug(POSTERIOR + "test_gradient_expectation")
def eta_is_taken_for_c(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Fixed, "__call__")
    def call(right, self, w, x, s, eta_per_c):
        return right(self, w, x, s, jnp.ones_like(eta_per_c))


@bug(POSTERIOR + "test_tuned_rule_in_numpy")
def the_tuned_control_has_the_other_sign(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, MinVariance, "__call__")
    def call(right, self, w, x, s, eta_per_c):
        mean, eta = right(self, w, x, s, eta_per_c)
        return 2 * (w @ x) - mean, -eta


@bug(POSTERIOR + "test_pooled_by_hand")
def pooled_estimates_count_alike(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Reverse, "__call__")
    def call(right, self, *args):
        return eqx.tree_at(lambda post: post.ess, right(self, *args), jnp.asarray(float(self.samples)))


@bug(MARKOV + "test_unbiased_where_the_policy_is_right")
def chains_start_elsewhere_than_at_the_endpoint(patch: pytest.MonkeyPatch) -> None:
    from contraflow.flow.posterior import gibbs, markov

    for module in (gibbs, markov):

        @wrong(patch, module, "pick_starts")
        def pick(right, *args):
            support, places = right(*args)
            return 0.0 * support, places


@bug(MARKOV + "test_unbiased_with_several_endpoints")
def endpoints_that_do_not_explain_x_t_start_chains(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, starts, "log_normal")
    def likelihood(right, x, mean, std):
        return 0.0 * right(x, mean, std)


@bug(MARKOV + "test_several_endpoints_are_less_noise")
def further_endpoints_are_not_used(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, starts, "systematic")
    def places(right, key, weights, n):
        return 0 * right(key, weights, n)


@bug(MARKOV + "test_unbiased_where_the_policy_is_right")
def a_sweep_ignores_the_density_of_its_candidates(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, strata.Strata, "_log_ratio")
    def ratio(right, self, u, cell):
        return 0.0 * right(self, u, cell)


@bug("flow/test_flow_strata.py")
def strata_forget_the_share_of_their_cell(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, strata.Strata, "_log_ratio")
    def ratio(right, self, u, cell):
        return right(self, u, cell) + jnp.log(self.mass[cell] * strata.CELLS)


@bug("flow/test_flow_strata.py::test_weights_but_for_the_critic_are_nearly_equal")
def strata_do_not_follow_the_likelihood(patch: pytest.MonkeyPatch) -> None:
    right = strata.Strata.fit

    def fit(cls, path, x_t, t):
        return eqx.tree_at(lambda s: s.x_t, right(path, 0.0 * x_t, t), x_t)

    patch.setattr(strata.Strata, "fit", classmethod(fit))


@bug("rl/test_rl_energy.py::test_integrates_to_the_law_over_actions")
def latent_actions_without_the_jacobian_of_tanh(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, energy, "log_sech2")
    def jacobian(right, u):
        return 0.0 * right(u)


@bug(POSTERIOR + "test_local_is_right_at_the_end_only")
def the_local_score_points_downhill(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Local, "__call__")
    def call(right, self, key, path, log_pi, *rest):
        return right(self, key, path, lambda u: -log_pi(u), *rest)


@bug("flow/test_flow_solver.py::test_euler_on_a_gaussian")
def times_of_a_solver_are_off_by_one(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, RungeKutta, "__call__")
    def solve(right, self, drift, x, t0, t1, key=None):
        return right(self, lambda x, t: drift(x, t + (t1 - t0) / self.steps), x, t0, t1, key)


@bug("flow/test_flow_solver.py::test_sde_keeps_the_marginals")
def the_noise_of_an_sde_has_no_drift_against_it(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, EulerMaruyama, "chain")
    def chain(right, self, drift, x, t0, t1, key):
        def uncorrected(x, t):
            v = drift(x, t)
            return v - 0.5 * self.sigma(t) ** 2 * self.path.score_from_velocity(v, x, t)

        return right(self, uncorrected, x, t0, t1, key)


@bug("flow/test_flow_likelihood.py::test_exact_for_a_linear_field")
def a_density_grows_where_the_flow_spreads(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Exact, "__call__")
    def divergence(right, self, *args):
        return -right(self, *args)


@bug("flow/test_flow_model.py::test_a_clip_bounds_the_end_and_moves_the_noise_with_it")
def a_clipped_end_leaves_its_noise_behind(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Flow, "ends")
    def ends(right, self, *args):
        free = replace(self, spec=replace(self.spec, clip=None))
        return right(self, *args)[0], right(free, *args)[1]


@bug("flow/test_flow_chain.py::test_log_density_by_hand")
def a_chain_is_scored_by_the_step_before(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, kernel, "log_prob")
    def density(right, steps, chain, learned):
        return right(lambda x, k: steps(x, k - 1), chain, learned)


@bug("flow/test_flow_chain.py::test_ddpm_noise")
def the_noise_of_ddpm_is_at_the_wrong_end(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, kernel, "posterior_std")
    def std(right, path, t, r):
        return right(path, t, r) * path.beta(t) / path.beta(r)


@bug("flow/test_flow_fewstep.py::test_two_steps_are_one")
def the_second_step_starts_where_the_first_did(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, fewstep, "split_target")
    def target(right, u, x_t, t, r, share):
        q = t + share * (r - t)
        return share * u(x_t, t, q) + (1 - share) * u(x_t, q, r)


@bug("flow/test_flow_fewstep.py::test_the_identity_of_mean_flow")
def mean_flow_moves_against_its_derivative(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, fewstep, "mean_flow_target")
    def target(right, u, v, x_t, t, r):
        return 2 * v - right(u, v, x_t, t, r)


@bug("flow/test_flow_coupling.py::test_the_best_permutation_by_brute_force")
def pairs_are_permuted_the_other_way(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, ConditionalOT, "__call__")
    def couple(right, self, x0, x1, cond):
        new, weight = right(self, x0, x1, cond)
        order = jnp.argmin(jnp.sum((new[:, None] - x0[None]) ** 2, -1), 1)
        return x0[jnp.argsort(order)], weight


@bug("flow/test_flow_jump.py::test_it_leaves_the_target_as_it_is")
def jumps_are_weighed_as_if_their_modes_had_one_width(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, jump, "log_normal")
    def log_normal(right, x, mean, std):
        return right(x, mean, 0.1)


@bug("flow/test_flow_jump.py::test_it_leaves_a_target_in_a_box_as_it_is")
def jumps_in_a_box_start_from_squashed_actions(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, jump.ModeJump, "__call__")
    def call(right, self, key, log_pi, u, support):
        return right(self, key, log_pi, u)


@bug("agents/test_rfm_modes.py::test_both_modes_are_kept_in_their_shares")
def jumps_end_where_they_started(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, jump.ModeJump, "__call__")
    def call(right, self, key, log_pi, u, support):
        return u, right(self, key, log_pi, u, support)[1]
