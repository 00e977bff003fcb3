"""Deliberate bugs, planted one by one: does the suite catch them?

    python tests/mutants.py [--only REGEX] [--files REGEX] [--jobs 2]      # --files . for all

Each mutant is a replacement in a copy of `src`, which must match exactly once. The tests mapped to it run on that copy
with `pytest -x -q`; caught means that a test failed (not that pytest could not start). First the same tests run on an
untouched copy and must pass; what they compile is kept for the mutants, where it is the same program. Exit code 1 if a
mutant survives.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import mutants_data
import mutants_imitation

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 900


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in src/contraflow/`file`; `tests` are files or tests in tests/ that should notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


COMPARE, REPORT = "compare/", "report/"
TOGETHER = COMPARE + "test_compare_together.py::"
POSTERIOR = "flow/test_flow_posterior.py::"
MARKOV = "flow/test_flow_markov.py::"
RFM = "agents/test_rfm.py::"
SAC = "agents/test_sac.py::"
ONLINE = "train/test_online.py::"
CONTROL = "envs/test_env_control.py::"
SEEDS = "train/test_seeds.py::"
CONTRACT = "contract/test_contract_agents.py::"

JOINT_CLIPPING = """updates, opt_state = tx.update(
        jax.vmap(jax.grad(lambda q: jnp.mean((jax.vmap(q)(batch.obs, batch.action) - y) ** 2)))(critic.members),
        opt_state,
    )
    members = eqx.apply_updates(critic.members, updates)
    _, _, loss, norm = jax.vmap(step)(critic.members, start_critic(tx, critic))"""

MUTANTS = (
    Mutant(
        "Langevin moves accepted without the way back",
        "flow/posterior.py",
        "jnp.sum(noise**2) - jnp.sum(back**2) / h",
        "jnp.sum(noise**2) - jnp.sum(noise**2)",
        (MARKOV + "test_unbiased_where_the_policy_is_right[langevin-0.5]",),
    ),
    Mutant(
        "resampling ignores the proposal's density",
        "flow/posterior.py",
        "return log_p(u) - self.proposal.log_prob(u, path, x_t, t, support)",
        "return log_p(u)",
        (MARKOV + "test_unbiased_where_the_policy_is_right[weights-0.15]",),
    ),
    Mutant(
        "chain starts elsewhere than at the endpoint",
        "flow/posterior.py",
        "jnp.concatenate([support[i][None], fresh])",
        "jnp.concatenate([0.0 * support[i][None], fresh])",
        (MARKOV + "test_unbiased_where_the_policy_is_right[weights-0.15]",),
    ),
    Mutant(
        "endpoints that do not explain x_t start chains",
        "flow/posterior.py",
        "lambda u: log_normal(x_t, a * u, b))(support))\n        place",
        "lambda u: 0 * log_normal(x_t, a * u, b))(support))\n        place",
        (MARKOV + "test_unbiased_with_several_endpoints",),
    ),
    Mutant(
        "further endpoints are not used",
        "flow/posterior.py",
        "which = jnp.searchsorted(",
        "which = 0 * jnp.searchsorted(",
        (MARKOV + "test_several_endpoints_are_less_noise",),
    ),
    Mutant(
        "step size not halved in the Langevin drift",
        "flow/posterior.py",
        "new = u + 0.5 * h * grad",
        "new = u + h * grad",
        (MARKOV + "test_unbiased_where_the_policy_is_right[langevin-0.5]",),
    ),
    Mutant(
        "weight of the chain's control variate at another time",
        "flow/posterior.py",
        "weight = self.control**2 / (1 + (self.control * a / b) ** 2)",
        "weight = self.control**2 / (1 + (self.control * b / a) ** 2)",
        (MARKOV + "test_control_leaves_no_variance_on_a_gaussian",),
    ),
    Mutant(
        "a chain that stands still",
        "flow/posterior.py",
        "jnp.where(place < accept, x, y)",
        "jnp.where(place < 0, x, y)",
        (MARKOV + "test_forgets_a_wrong_endpoint",),
    ),
    Mutant(
        "endpoint that was picked is not the one noised",
        "agents/rfm.py",
        "jnp.roll(u, -pick, axis=0)",
        "jnp.roll(u, pick, axis=0)",
        (RFM + "test_update_against_an_independent_one[policy]",),
    ),
    Mutant(
        "actions numbered by call, not by observation",
        "runtime/policy.py",
        "self._seen += len(batch)",
        "self._seen += 1",
        ("runtime/test_policy.py::test_one_observation_or_many",),
    ),
    Mutant(
        "every row of a batch gets the key of the first",
        "train/evaluate.py",
        "first + jnp.arange(obs.shape[0])",
        "first + 0 * jnp.arange(obs.shape[0])",
        ("runtime/test_policy.py::test_one_observation_or_many",),
    ),
    Mutant(
        "worst policy kept for the best",
        "train/record.py",
        "if returns.mean() > self._best:",
        "if returns.mean() < self._best or self._best == -np.inf:",
        ("train/test_train.py::test_the_best_policy_is_that_of_the_best_evaluation",),
    ),
    Mutant(
        "tanh Jacobian dropped",
        "rl/energy.py",
        "+ base * jnp.sum(log_sech2(u))",
        "+ 0.0 * jnp.sum(log_sech2(u))",
        ("rl/test_rl_energy.py",),
    ),
    Mutant(
        "sign of the posterior score",
        "flow/posterior.py",
        "a / b * x0 + grad,",
        "a / b * x0 - grad,",
        (RFM + "test_paper_estimator_is_the_official_rule",),
    ),
    Mutant(
        "time reversed in the path",
        "flow/path.py",
        "    def alpha(self, t):\n        return t\n\n    def beta(self, t):\n        return 1.0 - t\n",
        "    def alpha(self, t):\n        return 1.0 - t\n\n    def beta(self, t):\n        return t\n",
        ("flow/test_flow_path.py::test_ends",),
    ),
    Mutant(
        "truncation masks the TD target",
        "rl/td.py",
        "jnp.where(batch.terminated, 0.0",
        "jnp.where(batch.terminated | batch.truncated, 0.0",
        ("rl/test_rl_td.py",),
    ),
    Mutant(
        "Gymnasium adapter reports truncation as termination",
        "envs/gymnasium.py",
        "terminated, truncated = np.array(terminated, bool), np.array(truncated, bool)",
        "terminated, truncated = np.array(terminated, bool) | truncated, np.array(truncated, bool)",
        ("envs/test_env_gymnasium.py::test_vector_env_rows",),
    ),
    Mutant(
        "probe reports truncation as termination",
        "envs/probe.py",
        "step = Step(obs, next_obs, reward, terminated, truncated, valid)",
        "step = Step(obs, next_obs, reward, terminated | truncated, truncated, valid)",
        (ONLINE + "test_truncation_is_not_an_end",),
    ),
    Mutant(
        "observation after the reset stored as successor",
        "train/offpolicy.py",
        "Transition(obs, action, step.reward, step.next_obs,",
        "Transition(obs, action, step.reward, step.obs,",
        (ONLINE + "test_counters_returns_and_buffer",),
    ),
    Mutant(
        "one key for the candidates of a whole batch",
        "agents/rfm.py",
        "jax.vmap(posterior)(jr.split(k_posterior, n)",
        "jax.vmap(posterior)(jr.split(k_posterior, n)[jnp.zeros(n, int)]",
        (RFM + "test_update_against_an_independent_one[policy]",),
    ),
    Mutant(
        "one key for the noise of a whole batch of actions",
        "agents/sir.py",
        "jax.vmap(next_value)(batch.next_obs, jr.split(key, batch.reward.shape[0]))",
        "jax.vmap(lambda o: next_value(o, key))(batch.next_obs)",
        (CONTRACT + "test_noise_is_drawn_for_every_sample_of_a_batch[sir]",),
    ),
    Mutant(
        "one key for all environments",
        "train/offpolicy.py",
        "jax.vmap(lambda o, k: agent.act(state, o, k, True))(obs, jr.split(key, spec.num_envs))",
        "jax.vmap(lambda o: agent.act(state, o, key, True))(obs)",
        (ONLINE + "test_counters_returns_and_buffer",),
    ),
    Mutant(
        "target network not updated",
        "agents/rfm.py",
        "target = polyak(critic, state.target, self.tau)",
        "target = state.target",
        (CONTRACT + "test_target_moves_by_tau_towards_the_new_critic[rfm]",),
    ),
    Mutant(
        "target network moves by 1 - tau",
        "rl/td.py",
        "incremental_update(online, target, tau)",
        "incremental_update(online, target, 1 - tau)",
        ("rl/test_rl_td.py",),
    ),
    Mutant(
        "Polyak's arguments swapped in SAC",
        "agents/sac.py",
        "polyak(critic, state.target, self.tau)",
        "polyak(state.target, critic, self.tau)",
        (CONTRACT + "test_target_moves_by_tau_towards_the_new_critic[sac]",),
    ),
    Mutant(
        "units c and eta of the clip swapped",
        "flow/posterior.py",
        'self.clip if self.unit == "c" else self.clip / eta_per_c',
        'self.clip if self.unit == "eta" else self.clip / eta_per_c',
        (POSTERIOR + "test_units_of_the_clip",),
    ),
    Mutant(
        "eta taken for c in Fixed",
        "flow/posterior.py",
        "c = self.eta / eta_per_c",
        "c = self.eta * jnp.ones_like(eta_per_c)",
        (POSTERIOR + "test_gradient_expectation",),
    ),
    Mutant(
        "sign of the tuned control weight",
        "flow/posterior.py",
        "c = -jnp.sum(w2 * dx * ds, 0)",
        "c = jnp.sum(w2 * dx * ds, 0)",
        (RFM + "test_paper_estimator_is_the_official_rule",),
    ),
    Mutant(
        "importance ratio dropped for mixtures",
        "flow/posterior.py",
        "if not isinstance(self.proposal, Noise):",
        "if False:",
        (POSTERIOR + "test_consistent[mixture]",),
    ),
    Mutant(
        "maximum over the ensemble",
        "nets/critic.py",
        "return self(obs, action).min()",
        "return self(obs, action).max()",
        (RFM + "test_update_against_an_independent_one[policy]",),
    ),
    Mutant(
        "stop-gradient removed from the target",
        "flow/loss.py",
        "jax.lax.stop_gradient(path.velocity(x1, x_t, t))",
        "path.velocity(x1, x_t, t)",
        ("flow/test_flow_loss.py",),
    ),
    Mutant(
        "sign of the tanh term in SAC's log-density",
        "agents/sac.py",
        "log_normal(u, mean, std) - jnp.sum(log_sech2(u))",
        "log_normal(u, mean, std) + jnp.sum(log_sech2(u))",
        (SAC + "test_log_prob_is_the_density_of_the_action",),
    ),
    Mutant(
        "SAC's alpha moves the wrong way",
        "agents/sac.py",
        "log_alpha * (entropy - wanted)",
        "log_alpha * (wanted - entropy)",
        (SAC + "test_default_target_entropy_is_minus_the_action_dimension",),
    ),
    Mutant(
        "entropy cost left out of SAC's backup",
        "agents/sac.py",
        "return state.target.min(obs, action) - alpha * log_prob",
        "return state.target.min(obs, action)",
        (SAC + "test_backup_subtracts_the_entropy_cost",),
    ),
    Mutant(
        "backup asks the online critic",
        "agents/rfm.py",
        "return state.target.min(obs, jnp.tanh(u[pick]))",
        "return state.critic.min(obs, jnp.tanh(u[pick]))",
        (RFM + "test_update_against_an_independent_one[policy]",),
    ),
    Mutant(
        "replay ignores the validity mask",
        "data/buffer.py",
        "place = jnp.where(valid, place, capacity)",
        "place = jnp.where(True, place, capacity)",
        ("data/test_buffer.py",),
    ),
    Mutant(
        "n-step rows run on across episodes",
        "data/buffer.py",
        "jnp.where(rows.terminated | rows.truncated, -1, place)",
        "place",
        ("data/test_buffer.py",),
    ),
    Mutant(
        "n-step target discounts the value once",
        "rl/td.py",
        "gamma**batch.span",
        "gamma",
        ("rl/test_rl_td.py",),
    ),
    Mutant(
        "critics clipped by one joint norm",
        "rl/td.py",
        "members, opt_state, loss, norm = jax.vmap(step)(critic.members, opt_state)",
        JOINT_CLIPPING,
        ("rl/test_rl_td.py",),
    ),
    Mutant(
        "time grid of the solvers off by one",
        "flow/solve.py",
        "return step(x, t0 + dt * i, dt), None",
        "return step(x, t0 + dt * (i + 1.0), dt), None",
        ("flow/test_flow_solve.py::test_euler_on_a_gaussian",),
    ),
    Mutant(
        "sign of the divergence in the likelihood",
        "flow/likelihood.py",
        "jnp.asarray(source_scale)) + log_det, x0",
        "jnp.asarray(source_scale)) - log_det, x0",
        ("flow/test_flow_likelihood.py::test_exact_for_a_linear_field",),
    ),
    Mutant(
        "iteration counter lost on resume",
        "train/run.py",
        "return checkpoint.load(folder, step, Carry(shapes, env_shapes, obs_shape))",
        "found = checkpoint.load(folder, step, Carry(shapes, env_shapes, obs_shape))\n"
        '        object.__setattr__(found.learner, "iteration", jnp.zeros((), jnp.int32))\n'
        "        return found",
        ("train/test_resume.py::test_a_stopped_half_continues_bitwise",),
    ),
    Mutant(
        "pendulum moves with the speed before the step",
        "envs/control.py",
        "return jnp.stack([_wrap(angle + 0.05 * speed), speed]), reward",
        "return jnp.stack([_wrap(angle + 0.05 * body[1]), speed]), reward",
        (CONTROL + "test_pendulum_equals_gymnasium_from_any_state",),
    ),
    Mutant(
        "centrifugal force of the pole pushes the other way",
        "envs/control.py",
        "on_cart = force + POLE",
        "on_cart = force - POLE",
        (CONTROL + "test_cartpole_keeps_the_books_of_energy_and_momentum",),
    ),
    Mutant(
        "cartpole rewarded for the state before the step",
        "envs/control.py",
        "        body = jnp.stack([x, _wrap(angle), dx, dangle])\n        return body, cartpole",
        "        return jnp.stack([x, _wrap(angle), dx, dangle]), cartpole",
        (CONTROL + "test_cartpole_follows_dm_control",),
    ),
    Mutant(
        "rail without ends",
        "envs/control.py",
        "jnp.where(depth > 0, side",
        "jnp.where(depth > 9, side",
        (CONTROL + "test_cartpole_follows_dm_control",),
    ),
    Mutant(
        "Euler instead of RK4",
        "envs/control.py",
        "h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)",
        "h * k1",
        (CONTROL + "test_cartpole_conserves_energy_without_friction_and_force",),
    ),
    Mutant(
        "control task ends for good at its time limit",
        "envs/control.py",
        "reward, ~valid, truncated, valid)",
        "reward, truncated, truncated, valid)",
        (CONTROL + "test_ends_are_truncations_and_the_last_observation_is_true",),
    ),
    Mutant(
        "control task hands out the new episode as successor",
        "envs/control.py",
        "Step(observe(body), observe(moved),",
        "Step(observe(body), observe(body),",
        (CONTROL + "test_ends_are_truncations_and_the_last_observation_is_true",),
    ),
    Mutant(
        "seeds trained at once share a key",
        "train/seeds.py",
        "env, carry, k_run, n)",
        "env, carry, jnp.stack([k_run[0]] * len(live)), n)",
        (SEEDS + "test_each_seed_is_the_run_that_it_would_be_alone",),
    ),
    Mutant(
        "a seed's folder gets the data of another",
        "train/seeds.py",
        "one = _take(carry, s)\n",
        "one = _take(carry, 0)\n",
        (SEEDS + "test_each_seed_is_the_run_that_it_would_be_alone",),
    ),
    Mutant(
        "a seed's folder gets the returns of another",
        "train/seeds.py",
        "returns[s], k_eval[s]",
        "returns[-1 - s], k_eval[s]",
        (SEEDS + "test_each_seed_is_the_run_that_it_would_be_alone",),
    ),
    Mutant(
        "seeds evaluated at once share a key",
        "train/seeds.py",
        "jr.clone(k_eval)\n",
        "jnp.stack([k_eval[0]] * len(live))\n",
        (SEEDS + "test_each_seed_is_the_run_that_it_would_be_alone",),
    ),
    Mutant(
        "seeds move up when one fails",
        "train/seeds.py",
        "live = [live[s] for s in sound]",
        "live = list(range(len(sound)))",
        (SEEDS + "test_a_failing_seed_does_not_stop_the_others",),
    ),
    Mutant(
        "seeds resumed from a step that some have not saved",
        "train/seeds.py",
        "min(step for step in newest",
        "max(step for step in newest",
        (SEEDS + "test_killed_between_two_checkpoints",),
    ),
    Mutant(
        "every chunk of an evaluation draws the same noise",
        "train/evaluate.py",
        "i + jnp.arange(n)",
        "0 * i + jnp.arange(n)",
        (SEEDS + "test_evaluation_of_many_is_that_of_each",),
    ),
    Mutant(
        "a field unknown to an older release counts as changed",
        "compare/matrix.py",
        "return first_difference(_completed(old, value), ",
        "return first_difference(old, ",
        ("compare/test_compare_matrix.py",),
    ),
    Mutant(
        "a done cell is run again",
        "compare/pool.py",
        'return [cell for cell, status in self.status.items() if status == "waiting"]',
        "return list(self.status)",
        (COMPARE + "test_compare_pool.py",),
    ),
    Mutant(
        "a failed cell is not tried again",
        "compare/pool.py",
        '"done" if prepare(cell) == "done" else "waiting"',
        '"waiting" if prepare(cell) in ("new", "started") else "done"',
        (COMPARE + "test_compare_pool.py",),
    ),
    Mutant(
        "one worker more than asked",
        "compare/pool.py",
        "len(running) < jobs",
        "len(running) <= jobs",
        (COMPARE + "test_compare_pool.py",),
    ),
    Mutant(
        "workers are killed at Ctrl-C",
        "compare/pool.py",
        "        process.terminate()",
        "        process.kill()",
        (COMPARE + "test_compare_pool.py",),
    ),
    Mutant(
        "workers outlive the command",
        "compare/pool.py",
        "stdin=subprocess.PIPE",
        "stdin=None",
        (COMPARE + "test_compare_pool.py::test_a_killed_command_takes_its_workers_along",),
    ),
    Mutant(
        "several workers with all threads each",
        "compare/pool.py",
        "trust, jobs > 1)",
        "trust, jobs > 99)",
        (COMPARE + "test_compare_pool.py",),
    ),
    Mutant(
        "two commands in one matrix",
        "compare/pool.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        (COMPARE + "test_compare_pool.py",),
    ),
    Mutant(
        "a matrix goes on with other settings",
        "compare/matrix.py",
        "    return None if old == new else (where, old, new)",
        "    return None",
        (COMPARE + "test_compare_matrix.py",),
    ),
    Mutant(
        "a preset keeps its own networks",
        "compare/matrix.py",
        "if name not in own else set()",
        "if name in own else set()",
        (COMPARE + "test_compare_matrix.py",),
    ),
    Mutant(
        "agents after environments: a broken-off matrix lacks agents",
        "compare/matrix.py",
        "    for seed in range(seeds):\n        for env in envs:",
        "    for env in envs:\n        for seed in range(seeds):",
        (COMPARE + "test_compare_matrix.py",),
    ),
    Mutant(
        "random actions ranked by a critic",
        "compare/worker.py",
        "random = SIR(exploit=First(), width=1, depth=1)",
        "random = SIR(width=1, depth=1)",
        (COMPARE + "test_compare_worker.py" + "::test_random_actions_are_random",),
    ),
    Mutant(
        "an interrupted cell counts as done",
        "compare/worker.py",
        "if outcome.interrupted:",
        "if False:",
        (COMPARE + "test_compare_worker.py" + "::test_an_interrupted_cell_is_not_failed_and_goes_on",),
    ),
    Mutant(
        "the last policy in place of the best",
        "compare/worker.py",
        'load(folder / "best", trust=trust)',
        "load(folder, trust=trust)",
        (COMPARE + "test_compare_worker.py" + "::test_a_flow_is_evaluated_with_one_particle_and_without_its_actor",),
    ),
    Mutant(
        "seeds at different steps are trained together",
        "compare/matrix.py",
        "(cell.agent, cell.env, checkpoint.latest(cell.folder) or 0)",
        "(cell.agent, cell.env)",
        (TOGETHER + "test_seeds_that_have_parted_are_not_trained_together",),
    ),
    Mutant(
        "seeds without a first checkpoint are apart from those with one",
        "compare/matrix.py",
        "checkpoint.latest(cell.folder) or 0",
        "checkpoint.latest(cell.folder)",
        (TOGETHER + "test_seeds_that_have_parted_are_not_trained_together",),
    ),
    Mutant(
        "agents of one environment are trained together",
        "compare/matrix.py",
        "(cell.agent, cell.env, checkpoint",
        "(cell.env, checkpoint",
        (TOGETHER + "test_seeds_of_one_agent_on_one_environment_make_a_group",),
    ),
    Mutant(
        "seeds of host simulators share a process",
        "envs/__init__.py",
        "return env.spec.jittable",
        "return True",
        (TOGETHER + "test_environments_that_are_not_written_in_jax_keep_one_process_each",),
    ),
    Mutant(
        "simulators are built to see whether they are written in JAX",
        "envs/__init__.py",
        'if not colon or prefix in ("envpool", "gym"):',
        "if False:",
        (TOGETHER + "test_environments_that_are_not_written_in_jax_keep_one_process_each",),
    ),
    Mutant(
        "an environment that cannot be built stops the matrix",
        "compare/matrix.py",
        "except Exception:  # whatever",
        "except UserError:  # whatever",
        (TOGETHER + "test_environments_that_are_not_written_in_jax_keep_one_process_each",),
    ),
    Mutant(
        "a checkpoint that is being written counts",
        "train/checkpoint.py",
        "sorted(int(place.name) for place in places if place.is_dir() and place.name.isdecimal())",
        'sorted(int(place.name.split(".")[0]) for place in places if place.name[0].isdecimal())',
        (TOGETHER + "test_seeds_that_have_parted_are_not_trained_together",),
    ),
    Mutant(
        "the end of one seed is taken for that of another",
        "train/seeds.py",
        "{run.seed: failed.get(i, results[i]) for i, run in enumerate(runs)}",
        "{run.seed: failed.get(-1 - i, results[i]) for i, run in enumerate(runs)}",
        (TOGETHER + "test_each_seed_is_the_cell_that_it_would_be_alone",),
    ),
    Mutant(
        "an interrupted group starts again",
        "train/seeds.py",
        "return _drive(runs, folder, folders, envs, restored, quiet)",
        "return _drive(runs, folder, folders, envs, None, quiet)",
        (TOGETHER + "test_an_interrupted_group_goes_on",),
    ),
    Mutant(
        "one bad evaluation fails the whole group",
        "compare/worker.py",
        "        except Exception as error:\n            _trace(error)\n            outcome = error",
        "        except ZeroDivisionError as error:\n            _trace(error)\n            outcome = error",
        (TOGETHER + "test_a_policy_that_cannot_be_evaluated_leaves_the_others_done",),
    ),
    Mutant(
        "done seeds of a group are trained again",
        "compare/worker.py",
        "todo = [folder for folder in folders if not (folder / FINAL).exists()]",
        "todo = list(folders)",
        (TOGETHER + "test_each_seed_ends_as_it_ended",),
    ),
    Mutant(
        "a failed seed hides behind the others of its group",
        "compare/pool.py",
        "tally.ended(cell, ended(cell, process.returncode))",
        "tally.ended(cell, ended(group[0], process.returncode))",
        (COMPARE + "test_compare_pool.py",),
    ),
    Mutant(
        "seeds are trained together unasked",
        "compare/pool.py",
        "grouped(waiting, trust) if together else",
        "grouped(waiting, trust) if True else",
        (COMPARE + "test_compare_pool.py",),
    ),
    Mutant(
        "--together is not heard",
        "cli/compare.py",
        "*rest, options.together",
        "*rest, False",
        (COMPARE + "test_compare_cli.py",),
    ),
    Mutant(
        "environments are not looked up",
        "cli/compare.py",
        "        check(env, trust=options.trust)",
        "        pass",
        (COMPARE + "test_compare_cli.py",),
    ),
    Mutant(
        "interquartile mean cuts an eighth",
        "report/statistics.py",
        "flat.shape[-1] // 4",
        "flat.shape[-1] // 8",
        (REPORT + "test_report_statistics.py",),
    ),
    Mutant(
        "ties count nothing",
        "report/statistics.py",
        "0.5 * (a == b)",
        "0.0 * (a == b)",
        (REPORT + "test_report_statistics.py",),
    ),
    Mutant(
        "the bootstrap draws whole runs of all tasks",
        "report/statistics.py",
        "size=(500, *sample.shape)",
        "size=(500, len(sample), *([1] * (sample.ndim - 1)))",
        (REPORT + "test_report_statistics.py",),
    ),
    Mutant(
        "both sides with the same draws",
        "report/statistics.py",
        "        for sample in samples:\n            rows",
        "        for sample in samples:\n            rng = np.random.default_rng(0)\n            rows",
        (REPORT + "test_report_statistics.py",),
    ),
    Mutant(
        "an interval of 90 %",
        "report/statistics.py",
        "LEVEL = 0.95",
        "LEVEL = 0.90",
        (REPORT + "test_report_statistics.py",),
    ),
    Mutant(
        "unfinished runs are taken",
        "report/runs.py",
        'evaluations[-1].get("step", 0) < run["steps"]',
        'evaluations[-1].get("step", 0) < 0',
        (REPORT + "test_report_runs.py",),
    ),
    Mutant(
        "gradient steps during the warm-up",
        "report/runs.py",
        "max(0.0, step - first)",
        "max(0.0, step)",
        (REPORT + "test_report_runs.py",),
    ),
    Mutant(
        "seeds that lack a task stay",
        "report/scores.py",
        "set.intersection(",
        "set.union(",
        (REPORT + "test_report_runs.py",),
    ),
    Mutant(
        "LQR is divided by 1000",
        "report/scores.py",
        '"/lqr" not in env',
        "True",
        (REPORT + "test_report_runs.py",),
    ),
    Mutant(
        "settings that differ are not told",
        "report/page.py",
        "if name in FAIR and len(present) > 1:",
        "if False:",
        (REPORT + "test_report_page.py",),
    ),
    Mutant(
        "a verdict on four seeds",
        "report/page.py",
        "ENOUGH = 5",
        "ENOUGH = 4",
        (REPORT + "test_report_page.py",),
    ),
    Mutant(
        "names are not escaped",
        "report/page.py",
        "<{tag}{m}>{escape(c)}</{tag}>",
        "<{tag}{m}>{c}</{tag}>",
        (REPORT + "test_report_page.py",),
    ),
    Mutant(
        "an empty chart",
        "report/charts.py",
        "    axis.plot(grid, band.value",
        "    _ = 0 and axis.plot(grid, band.value",
        (REPORT + "test_report_page.py",),
    ),
)


def copy_source(folder: Path) -> Path:
    target = folder / "src"
    shutil.copytree(ROOT / "src", target, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def plant(mutant: Mutant, source: Path) -> None:
    """Raises ValueError unless the text to replace is there exactly once."""
    file = source / "contraflow" / mutant.file
    text = file.read_text()
    if (found := text.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.name}: {mutant.old!r} occurs {found} times in {mutant.file}; mend tests/mutants.py")
    file.write_text(text.replace(mutant.old, mutant.new))


def run(source: Path, tests: tuple[str, ...], cache: Path) -> tuple[int, str]:
    """Exit code and output of pytest on the copy; compiled programs are kept in `cache`, one folder per thread."""
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1 --xla_backend_optimization_level=0"
    environment = os.environ | {"PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1", "XLA_FLAGS": flags}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(cache / threading.current_thread().name)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider"]
    if all("::" in t for t in tests):  # of a whole file the default tests, by name also a slow one
        command += ["-m", "not gpu"]
    paths = [str(Path("tests") / t) for t in tests]
    for _ in range(4):
        try:
            done = subprocess.run(
                command + paths, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired:
            return -1, f"no end within {TIMEOUT} s"
        if done.returncode >= 0:  # a signal from outside says nothing about the mutant: once more
            break
    return done.returncode, f"{done.stdout}{done.stderr}\nexit code {done.returncode}"


def judge(mutant: Mutant, cache: Path) -> tuple[Mutant, str | None, str, float]:
    """(mutant, the test that caught it or None, pytest's output, seconds)."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        source = copy_source(Path(folder))
        plant(mutant, source)
        code, output = run(source, mutant.tests, cache)
    caught = re.search(r"^FAILED (\S+)", output, re.MULTILINE)
    return mutant, caught[1] if code == 1 and caught else None, output, time.monotonic() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants whose name matches this regular expression")
    parser.add_argument(
        "--files",
        default="^(?!compare/|report/|cli/compare)",
        help="mutants in files whose names match; by default all but comparing and reporting",
    )
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    chosen = [
        m
        for m in (*MUTANTS, *(Mutant(*row) for row in (*mutants_data.ROWS, *mutants_imitation.ROWS)))
        if re.search(options.only, m.name) and re.search(options.files, m.file)
    ]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder, ThreadPoolExecutor(options.jobs) as pool:
        source = copy_source(Path(folder))
        for mutant in chosen:  # all replacements match before any time is spent
            text = (source / "contraflow" / mutant.file).read_text()
            if text.count(mutant.old) != 1:
                plant(mutant, source)
        where = [sys.executable, "-c", "import contraflow; print(contraflow.__file__)"]
        imported = subprocess.run(where, env=os.environ | {"PYTHONPATH": str(source)}, capture_output=True, text=True)
        if not imported.stdout.startswith(str(source)):
            print(f"the copy is not what gets imported: {imported.stdout or imported.stderr}")
            return 2
        # The untouched tests in as many parts as there are jobs, each test once.
        tests = list(dict.fromkeys(t for m in chosen for t in m.tests))
        kinds = [[t for t in tests if "::" in t], [t for t in tests if "::" not in t]]
        parts = [
            tuple(kind[i :: options.jobs]) for kind in kinds for i in range(options.jobs) if kind[i :: options.jobs]
        ]
        for code, output in pool.map(lambda part: run(source, part, Path(folder)), parts):
            if code != 0:
                print("the tests fail without any mutant:\n" + output)
                return 2
        print(f"{len(tests)} mapped files and tests pass untouched ({time.monotonic() - begin:.0f} s)", flush=True)
        survivors = 0
        for mutant, caught, output, seconds in pool.map(lambda mutant: judge(mutant, Path(folder)), chosen):
            survivors += caught is None
            print(
                f"{'caught  ' if caught else 'SURVIVED'} {mutant.name:52} {seconds:4.0f} s  {caught or ''}", flush=True
            )
            if caught is None:
                print(output[-2000:], flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} caught in {time.monotonic() - begin:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
