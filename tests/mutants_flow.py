"""Bugs for `mutants.py` in flows, estimators, networks and sampling: (name, file, old, new, tests)."""

POSTERIOR = "flow/test_flow_posterior.py::"
MARKOV = "flow/test_flow_markov.py::"
RFM = "agents/test_rfm.py::"

ROWS: tuple[tuple[str, str, str, str, tuple[str, ...]], ...] = (
    (
        "Langevin moves accepted without the way back",
        "flow/posterior.py",
        "jnp.sum(noise**2) - jnp.sum(back**2) / h",
        "jnp.sum(noise**2) - jnp.sum(noise**2)",
        (MARKOV + "test_unbiased_where_the_policy_is_right[langevin-0.5]",),
    ),
    (
        "resampling ignores the proposal's density",
        "flow/posterior.py",
        "return log_p(u) - self.proposal.log_prob(u, path, x_t, t, support)",
        "return log_p(u)",
        (MARKOV + "test_unbiased_where_the_policy_is_right[weights-0.15]",),
    ),
    (
        "chain starts elsewhere than at the endpoint",
        "flow/posterior.py",
        "mine = jnp.concatenate([support[start][None], fresh])",
        "mine = jnp.concatenate([0.0 * support[start][None], fresh])",
        (MARKOV + "test_unbiased_where_the_policy_is_right[weights-0.15]",),
    ),
    (
        "endpoints that do not explain x_t start chains",
        "flow/posterior.py",
        "lambda u: log_normal(x_t, a * u, b))(support))\n        starts",
        "lambda u: 0 * log_normal(x_t, a * u, b))(support))\n        starts",
        (MARKOV + "test_unbiased_with_several_endpoints",),
    ),
    (
        "further endpoints are not used",
        "flow/posterior.py",
        "starts = systematic(",
        "starts = 0 * systematic(",
        (MARKOV + "test_several_endpoints_are_less_noise",),
    ),
    (
        "step size not halved in the Langevin drift",
        "flow/posterior.py",
        "new = u + 0.5 * h * grad",
        "new = u + h * grad",
        (MARKOV + "test_unbiased_where_the_policy_is_right[langevin-0.5]",),
    ),
    (
        "weight of the chain's control variate at another time",
        "flow/posterior.py",
        "weight = self.control**2 / (1 + (self.control * a / b) ** 2)",
        "weight = self.control**2 / (1 + (self.control * b / a) ** 2)",
        (MARKOV + "test_control_leaves_no_variance_on_a_gaussian",),
    ),
    (
        "a chain that stands still",
        "flow/posterior.py",
        "jnp.where(place < accept, x, y)",
        "jnp.where(place < 0, x, y)",
        (MARKOV + "test_forgets_a_wrong_endpoint",),
    ),
    (
        "sign of the posterior score",
        "flow/posterior.py",
        "a / b * x0 + grad,",
        "a / b * x0 - grad,",
        (RFM + "test_paper_estimator_is_the_official_rule",),
    ),
    (
        "time reversed in the path",
        "flow/path.py",
        "    def alpha(self, t):\n        return t\n\n    def beta(self, t):\n        return 1.0 - t\n",
        "    def alpha(self, t):\n        return 1.0 - t\n\n    def beta(self, t):\n        return t\n",
        ("flow/test_flow_path.py::test_ends",),
    ),
    (
        "units c and eta of the clip swapped",
        "flow/posterior.py",
        'self.clip if self.unit == "c" else self.clip / eta_per_c',
        'self.clip if self.unit == "eta" else self.clip / eta_per_c',
        (POSTERIOR + "test_units_of_the_clip",),
    ),
    (
        "eta taken for c in Fixed",
        "flow/posterior.py",
        "c = self.eta / eta_per_c",
        "c = self.eta * jnp.ones_like(eta_per_c)",
        (POSTERIOR + "test_gradient_expectation",),
    ),
    (
        "sign of the tuned control weight",
        "flow/posterior.py",
        "c = -jnp.sum(w2 * dx * ds, 0)",
        "c = jnp.sum(w2 * dx * ds, 0)",
        (RFM + "test_paper_estimator_is_the_official_rule",),
    ),
    (
        "importance ratio dropped for mixtures",
        "flow/posterior.py",
        "if not isinstance(self.proposal, Noise):",
        "if False:",
        (POSTERIOR + "test_consistent[mixture]",),
    ),
    (
        "maximum over the ensemble",
        "nets/critic.py",
        "jax.nn.one_hot(jnp.argmin(q), q.shape[0])",
        "jax.nn.one_hot(jnp.argmax(q), q.shape[0])",
        (RFM + "test_update_against_an_independent_one[policy]",),
    ),
    (
        "stop-gradient removed from the target",
        "flow/loss.py",
        "jax.lax.stop_gradient(convert(x1, x_t, t))",
        "convert(x1, x_t, t)",
        ("flow/test_flow_loss.py",),
    ),
    (
        "time grid of the solvers off by one",
        "flow/solve.py",
        "return step(x, t0 + dt * i, dt), None",
        "return step(x, t0 + dt * (i + 1.0), dt), None",
        ("flow/test_flow_solve.py::test_euler_on_a_gaussian",),
    ),
    (
        "sign of the divergence in the likelihood",
        "flow/likelihood.py",
        "jnp.asarray(source_scale)) + log_det, x0",
        "jnp.asarray(source_scale)) - log_det, x0",
        ("flow/test_flow_likelihood.py::test_exact_for_a_linear_field",),
    ),
)
