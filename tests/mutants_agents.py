"""Bugs for `mutants.py` in agents and what they share: (name, file, old, new, tests)."""

RFM = "agents/test_rfm.py::"
SAC = "agents/test_sac.py::"
CONTRACT = "contract/test_contract_agents.py::"
JOINT_CLIPPING = """updates, opt_state = tx.update(
        jax.vmap(jax.grad(lambda q: jnp.mean((jax.vmap(q)(batch.obs, batch.action) - y) ** 2)))(critic.members),
        opt_state,
    )
    members = eqx.apply_updates(critic.members, updates)
    _, _, loss, norm = jax.vmap(step)(critic.members, start_critic(tx, critic))"""

ROWS: tuple[tuple[str, str, str, str, tuple[str, ...]], ...] = (
    (
        "endpoint that was picked is not the one noised",
        "agents/rfm.py",
        "jnp.roll(u, -pick, axis=0)",
        "jnp.roll(u, pick, axis=0)",
        (RFM + "test_update_against_an_independent_one[policy]",),
    ),
    (
        "tanh Jacobian dropped",
        "rl/energy.py",
        "+ base * jnp.sum(log_sech2(u))",
        "+ 0.0 * jnp.sum(log_sech2(u))",
        ("rl/test_rl_energy.py",),
    ),
    (
        "truncation masks the TD target",
        "rl/td.py",
        "jnp.where(batch.terminated, 0.0",
        "jnp.where(batch.terminated | batch.truncated, 0.0",
        ("rl/test_rl_td.py",),
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
        "jax.vmap(next_value)(batch.next_obs, jr.split(key, batch.reward.shape[0]))",
        "jax.vmap(lambda o: next_value(o, key))(batch.next_obs)",
        (CONTRACT + "test_noise_is_drawn_for_every_sample_of_a_batch[sir]",),
    ),
    (
        "target network not updated",
        "agents/rfm.py",
        "target = polyak(critic, state.target, self.tau)",
        "target = state.target",
        (CONTRACT + "test_target_moves_by_tau_towards_the_new_critic[rfm]",),
    ),
    (
        "target network moves by 1 - tau",
        "rl/td.py",
        "incremental_update(online, target, tau)",
        "incremental_update(online, target, 1 - tau)",
        ("rl/test_rl_td.py",),
    ),
    (
        "Polyak's arguments swapped in SAC",
        "agents/sac.py",
        "polyak(critic, state.target, self.tau)",
        "polyak(state.target, critic, self.tau)",
        (CONTRACT + "test_target_moves_by_tau_towards_the_new_critic[sac]",),
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
        "return state.target.min(obs, action) - alpha * log_prob",
        "return state.target.min(obs, action)",
        (SAC + "test_backup_subtracts_the_entropy_cost",),
    ),
    (
        "backup asks the online critic",
        "agents/rfm.py",
        "return state.target.min(obs, jnp.tanh(u[pick]))",
        "return state.critic.min(obs, jnp.tanh(u[pick]))",
        (RFM + "test_update_against_an_independent_one[policy]",),
    ),
    (
        "n-step target discounts the value once",
        "rl/td.py",
        "gamma**batch.span",
        "gamma",
        ("rl/test_rl_td.py",),
    ),
    (
        "critics clipped by one joint norm",
        "rl/td.py",
        "members, opt_state, loss, norm = jax.vmap(step)(critic.members, opt_state)",
        JOINT_CLIPPING,
        ("rl/test_rl_td.py",),
    ),
)
