"""Bugs for `mutants.py` in training, the buffer and the command line: (name, file, old, new, tests)."""

TOGETHER = "compare/test_compare_together.py::"
ONLINE = "train/test_online.py::"
SEEDS = "train/test_seeds.py::"
PLAYGROUND = "envs/test_playground.py::"
DIAGNOSTICS = "train/test_diagnostics.py::"

ROWS: tuple[tuple[str, str, str, str, tuple[str, ...]], ...] = (
    (
        "actions numbered by call, not by observation",
        "runtime/policy.py",
        "self._seen += len(batch)",
        "self._seen += 1",
        ("runtime/test_policy.py::test_one_observation_or_many",),
    ),
    (
        "every row of a batch gets the key of the first",
        "train/evaluate.py",
        "first + jnp.arange(obs.shape[0])",
        "first + 0 * jnp.arange(obs.shape[0])",
        ("runtime/test_policy.py::test_one_observation_or_many",),
    ),
    (
        "worst policy kept for the best",
        "train/record.py",
        "if returns.mean() > self._best:",
        "if returns.mean() < self._best or self._best == -np.inf:",
        ("train/test_train.py::test_the_best_policy_is_that_of_the_best_evaluation",),
    ),
    (
        "observation after the reset stored as successor",
        "train/offpolicy.py",
        "Transition(obs, action, step.reward, step.next_obs,",
        "Transition(obs, action, step.reward, step.obs,",
        (ONLINE + "test_counters_returns_and_buffer",),
    ),
    (
        "one key for all environments",
        "train/offpolicy.py",
        "jax.vmap(lambda o, k: agent.act(state, o, k, True))(obs, jr.split(key, spec.num_envs))",
        "jax.vmap(lambda o: agent.act(state, o, key, True))(obs)",
        (ONLINE + "test_counters_returns_and_buffer",),
    ),
    (
        "replay ignores the validity mask",
        "data/buffer.py",
        "place = jnp.where(valid, place, capacity)",
        "place = jnp.where(True, place, capacity)",
        ("data/test_buffer.py",),
    ),
    (
        "n-step rows run on across episodes",
        "data/buffer.py",
        "jnp.where(rows.terminated | rows.truncated, -1, place)",
        "place",
        ("data/test_buffer.py",),
    ),
    (
        "iteration counter lost on resume",
        "train/run.py",
        "return checkpoint.load(folder, step, Carry(shapes, env_shapes, obs_shape))",
        "found = checkpoint.load(folder, step, Carry(shapes, env_shapes, obs_shape))\n"
        '        object.__setattr__(found.learner, "iteration", jnp.zeros((), jnp.int32))\n'
        "        return found",
        ("train/test_resume.py::test_a_stopped_half_continues_bitwise",),
    ),
    (
        "seeds trained at once share a key",
        "train/seeds.py",
        "env, carry, k_run, n)",
        "env, carry, jnp.stack([k_run[0]] * len(live)), n)",
        (SEEDS + "test_each_seed_is_the_run_that_it_would_be_alone",),
    ),
    (
        "a seed's folder gets the data of another",
        "train/seeds.py",
        "one = _take(carry, s)\n",
        "one = _take(carry, 0)\n",
        (SEEDS + "test_each_seed_is_the_run_that_it_would_be_alone",),
    ),
    (
        "a seed's folder gets the returns of another",
        "train/seeds.py",
        "returns[s], k_eval[s]",
        "returns[-1 - s], k_eval[s]",
        (SEEDS + "test_each_seed_is_the_run_that_it_would_be_alone",),
    ),
    (
        "seeds evaluated at once share a key",
        "train/seeds.py",
        "jr.clone(k_eval)\n",
        "jnp.stack([k_eval[0]] * len(live))\n",
        (SEEDS + "test_each_seed_is_the_run_that_it_would_be_alone",),
    ),
    (
        "seeds move up when one fails",
        "train/seeds.py",
        "live = [live[s] for s in sound]",
        "live = list(range(len(sound)))",
        (SEEDS + "test_a_failing_seed_does_not_stop_the_others",),
    ),
    (
        "seeds resumed from a step that some have not saved",
        "train/seeds.py",
        "min(step for step in newest",
        "max(step for step in newest",
        (SEEDS + "test_killed_between_two_checkpoints",),
    ),
    (
        "every chunk of an evaluation draws the same noise",
        "train/evaluate.py",
        "i + jnp.arange(n)",
        "0 * i + jnp.arange(n)",
        (SEEDS + "test_evaluation_of_many_is_that_of_each",),
    ),
    (
        "a checkpoint that is being written counts",
        "train/checkpoint.py",
        "sorted(int(place.name) for place in places if place.is_dir() and place.name.isdecimal())",
        'sorted(int(place.name.split(".")[0]) for place in places if place.name[0].isdecimal())',
        (TOGETHER + "test_seeds_that_have_parted_are_not_trained_together",),
    ),
    (
        "the end of one seed is taken for that of another",
        "train/seeds.py",
        "{run.seed: failed.get(i, results[i]) for i, run in enumerate(runs)}",
        "{run.seed: failed.get(-1 - i, results[i]) for i, run in enumerate(runs)}",
        (TOGETHER + "test_each_seed_is_the_cell_that_it_would_be_alone",),
    ),
    (
        "an interrupted group starts again",
        "train/seeds.py",
        "return _drive(runs, folder, folders, envs, restored, quiet)",
        "return _drive(runs, folder, folders, envs, None, quiet)",
        (TOGETHER + "test_an_interrupted_group_goes_on",),
    ),
    (
        "empty arrays go into a checkpoint",
        "train/checkpoint.py",
        "jax.tree.leaves(tree) if leaf.size]",
        "jax.tree.leaves(tree)]",
        (PLAYGROUND + "test_a_checkpoint_holds_what_a_simulator_carries",),
    ),
    (
        "variance counts as bias of the target",
        "train/diagnostics.py",
        "(post.mean.mean(0) - exact.mean) ** 2",
        "(post.mean - exact.mean) ** 2",
        (DIAGNOSTICS + "test_variance_is_no_bias",),
    ),
    (
        "the effective sample size of the target for that of its reference",
        "train/diagnostics.py",
        "** 2), exact.ess",
        "** 2), post.ess.mean()",
        (DIAGNOSTICS + "test_a_reference_of_few_candidates_says_so",),
    ),
    (
        "entropy of bins without their width",
        "train/diagnostics.py",
        "jnp.maximum(share, 1e-12) / width",
        "jnp.maximum(share, 1e-12)",
        (DIAGNOSTICS + "test_the_law_of_a_corner_is_told",),
    ),
    (
        "the gap of values without the temperature",
        "train/diagnostics.py",
        "jnp.mean(q.max(1) - q.min(1)) / lam",
        "jnp.mean(q.max(1) - q.min(1))",
        (DIAGNOSTICS + "test_the_gap_of_values_is_in_units_of_the_temperature",),
    ),
)
