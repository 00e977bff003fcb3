"""Bugs for `mutants.py` in agents: (name, file, old, new, tests)."""

RFM = "agents/test_rfm.py::"
SAC = "agents/test_sac.py::"
PMD = "agents/test_pmd.py::"
DACER = "agents/test_dacer.py::"
TD3 = "agents/test_td3.py::"
LATENT = "rl/test_latent_flow.py::"
CONTRACT = "contract/test_contract_agents.py::"

ROWS: tuple[tuple[str, str, str, str, tuple[str, ...]], ...] = (
    (
        "endpoint that was picked is not the one noised",
        "agents/rfm.py",
        "jnp.roll(u, -best, axis=0)",
        "jnp.roll(u, best, axis=0)",
        (RFM + "test_update_against_an_independent_one[policy]",),
    ),
    (
        "one key for the candidates of a whole batch",
        "agents/rfm.py",
        "jax.vmap(posterior)(jr.split(k_posterior, n)",
        "jax.vmap(posterior)(jr.split(k_posterior, n)[jnp.zeros(n, int)]",
        (RFM + "test_update_against_an_independent_one[policy]",),
    ),
    (
        "one key for the noise of a whole batch of actions",
        "agents/sir.py",
        "keys = jr.split(k_next, batch.reward.shape[0])",
        "keys = jnp.stack([k_next] * batch.reward.shape[0])",
        (CONTRACT + "test_noise_is_drawn_for_every_sample_of_a_batch[sir]",),
    ),
    (
        "sign of the tanh term in SAC's log-density",
        "agents/sac.py",
        "log_normal(u, mean, std) - jnp.sum(log_sech2(u))",
        "log_normal(u, mean, std) + jnp.sum(log_sech2(u))",
        (SAC + "test_log_prob_is_the_density_of_the_action",),
    ),
    (
        "SAC's alpha moves the wrong way",
        "agents/sac.py",
        "log_alpha * (entropy - wanted)",
        "log_alpha * (wanted - entropy)",
        (SAC + "test_default_target_entropy_is_minus_the_action_dimension",),
    ),
    (
        "entropy cost left out of SAC's backup",
        "agents/sac.py",
        "batch, action, k_critic, -alpha * log_prob",
        "batch, action, k_critic",
        (SAC + "test_backup_subtracts_the_entropy_cost",),
    ),
    (
        "candidates weighted by how bad they are",
        "agents/pmd.py",
        "p = jax.nn.softmax(q / lam)",
        "p = jax.nn.softmax(-q / lam)",
        (PMD + "test_one_iterate_of_mirror_descent",),
    ),
    (
        "candidates of the fast actor",
        "agents/pmd.py",
        "a = self._draw(state.slow, obs, k_policy, self.candidates)",
        "a = self._draw(state.actor, obs, k_policy, self.candidates)",
        (PMD + "test_one_iterate_of_mirror_descent",),
    ),
    (
        "uniform actions weigh nothing",
        "agents/pmd.py",
        "share = self.uniform_share * jnp.max(",
        "share = 0.0 * jnp.max(",
        (PMD + "test_advantage_weights_seek_the_best_and_uniform_actions_keep_wide",),
    ),
    (
        "targets made by the fast actor",
        "agents/td3.py",
        "jnp.tanh(jax.vmap(state.slow)(batch.next_obs))",
        "jnp.tanh(jax.vmap(state.actor)(batch.next_obs))",
        (TD3 + "test_targets_are_smoothed_and_made_by_the_slow_copy",),
    ),
    (
        "targets are not smoothed",
        "agents/td3.py",
        "noise = self.smoothing * jr.normal",
        "noise = 0.0 * jr.normal",
        (TD3 + "test_targets_are_smoothed_and_made_by_the_slow_copy",),
    ),
    (
        "the actor never waits",
        "agents/td3.py",
        "due = state.step % self.delay == self.delay - 1",
        "due = state.step >= 0",
        (TD3 + "test_the_actor_waits",),
    ),
    (
        "soft backup with the wrong sign",
        "agents/rfm.py",
        "else lam * entropy * action.shape[-1]",
        "else -lam * entropy * action.shape[-1]",
        (RFM + "test_update_against_an_independent_one[soft]",),
    ),
    (
        "the noise is tuned away from its entropy",
        "agents/dacer.py",
        "self.scale.move(state.log_scale, entropy)",
        "self.scale.move(state.log_scale, 2 * self.scale.entropy - entropy)",
        (DACER + "test_the_noise_keeps_the_entropy",),
    ),
    (
        "the sampler goes down Q",
        "agents/dacer.py",
        "return -critic.value(obs, self._sample(actor, obs, key))",
        "return critic.value(obs, self._sample(actor, obs, key))",
        (DACER + "test_the_sampler_collapses_to_the_best_action",),
    ),
    (
        "slow teacher of average velocities stands still",
        "agents/rfm.py",
        "polyak(actor, state.slow, self.follow)",
        "polyak(actor, state.slow, 0.0 * self.follow)",
        (LATENT + "test_update_adds_both_and_moves_the_copy",),
    ),
    (
        "shares of matching and tying swapped",
        "agents/rfm.py",
        "self.objective.share * loss + (1 - self.objective.share) * jnp.mean(tie)",
        "(1 + 0 * self.objective.share) * loss + (1 - self.objective.share) * jnp.mean(tie)",
        (LATENT + "test_update_adds_both_and_moves_the_copy",),
    ),
    (
        "temperature falls where the effective size is too small",
        "agents/rfm.py",
        "else jnp.mean(jnp.log(post.ess))",
        "else 2 * self.temperature.entropy - jnp.mean(jnp.log(post.ess))",
        ("rl/test_rl_temperature.py::test_it_settles_at_the_effective_size_asked_for",),
    ),
    (
        "statistics do not reach the actions",
        "agents/sac.py",
        "obs = seen(state.stats, obs)",
        "obs = seen(None, obs)",
        ("agents/test_normalise_obs.py::test_scale_and_offset_do_not_matter[sac]",),
    ),
    (
        "statistics are not kept",
        "agents/rfm.py",
        "stats, batch = look(state.stats, batch)",
        "stats, batch = state.stats, look(state.stats, batch)[1]",
        ("agents/test_normalise_obs.py::test_scale_and_offset_do_not_matter[rfm]",),
    ),
    (
        "gradient stops at the box",
        "agents/dacer.py",
        "jnp.where((jnp.abs(end) > 1.0) & (end * g < 0.0), 0.0, g)",
        "jnp.where(jnp.abs(end) > 1.0, 0.0, g)",
        (DACER + "test_an_end_beyond_the_box_comes_back_and_goes_no_further",),
    ),
    (
        "gradient drives an end out of the box",
        "agents/dacer.py",
        "jnp.where((jnp.abs(end) > 1.0) & (end * g < 0.0), 0.0, g)",
        "g",
        (DACER + "test_an_end_beyond_the_box_comes_back_and_goes_no_further",),
    ),
    (
        "base law with another kappa",
        "agents/sir.py",
        "minval=1e-37)) / kappa) * cos**2",
        "minval=1e-37)) / kappa) * cos",
        ("agents/test_sir.py::test_first_shows_the_base_and_argmax_the_best",),
    ),
    (
        "base law on the faces is not a number",
        "agents/sir.py",
        "jnp.sign(cos) / jnp.sqrt(1.0 + 1.0 / odds)",
        "jnp.sign(cos) * jnp.sqrt(odds / (1.0 + odds))",
        ("agents/test_sir.py::test_a_base_on_the_faces_is_finite",),
    ),
)
