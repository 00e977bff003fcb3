"""Probe environments and bandits: brute-force returns against the values they state, inside jit and scan."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.envs.bandit import BANDITS, Bandit, Flat, Linear, TwoPeak
from contraflow.envs.probe import PROBES, Probe, mistaken_value

N, T = 6, 23
ENVS = {f"probe:{k}": v(N) for k, v in PROBES.items()} | {f"bandit:{k}": Bandit(v(), 3, N) for k, v in BANDITS.items()}


def rollout(env, policy, steps=T):
    """key -> (obs [T, N, o], Step with leading [T]) under policy(obs [N, o]) -> [N, a], compiled as one scan."""

    def body(carry, _):
        state, obs = carry
        state, step = env.step(state, policy(obs))
        return (state, step.obs), (obs, step)

    return jax.jit(lambda key: jax.lax.scan(body, env.reset(key), None, steps)[1])


@pytest.mark.parametrize("name", ENVS)
def test_contract(name):
    env = ENVS[name]
    spec = env.spec
    assert spec.jittable and spec.num_envs == N
    assert hash(env) == hash(type(env)(**vars(env)))
    run = rollout(env, lambda obs: jnp.zeros((N, spec.action_dim)))
    obs, step = run(jr.key(0))
    assert obs.shape == step.obs.shape == step.next_obs.shape == (T, N, spec.obs_dim)
    assert obs.dtype == step.obs.dtype == step.next_obs.dtype == step.reward.dtype == jnp.float32
    assert step.reward.shape == step.terminated.shape == step.truncated.shape == step.valid.shape == (T, N)
    assert step.terminated.dtype == step.truncated.dtype == step.valid.dtype == bool
    assert step.valid.all() and not (step.terminated & step.truncated).any()
    done = step.terminated | step.truncated
    np.testing.assert_array_equal(step.obs[:-1], obs[1:])
    np.testing.assert_array_equal(done, (np.arange(1, T + 1) % spec.episode_length == 0)[:, None] * np.ones(N, bool))
    np.testing.assert_array_equal(step.obs[~done], step.next_obs[~done])
    if isinstance(env, Probe):
        true_next, _ = jax.vmap(jax.vmap(env.move))(obs, jnp.zeros((T, N, 1)))
        np.testing.assert_allclose(step.next_obs, true_next, atol=1e-6)
    np.testing.assert_array_equal(obs, run(jr.key(0))[0])


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_probe_values(name, gamma):
    """Discounted return of the best action, summed until termination and through truncation, from every state seen."""
    env = PROBES[name](N)
    obs, step = rollout(env, jax.vmap(env.best_action), steps=400)(jr.key(1))
    value = np.asarray(jax.vmap(jax.vmap(lambda o: env.value(o, gamma)))(obs))
    returns = np.zeros((400, N))
    later = np.zeros(N)
    for t in reversed(range(400)):
        later = returns[t] = step.reward[t] + gamma * (1 - step.terminated[t]) * later
    # A Monte Carlo sum is cut at the end of the data; the first 200 states are far enough from it (0.9^200 = 7e-10).
    # Through a truncation the sum continues in the next episode, legitimate where that starts at the true successor.
    np.testing.assert_allclose(returns[:200], value[:200], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PROBES)
def test_probe_best_actions(name):
    """No action on a grid does better than the one stated: Q(s, a) = r + gamma (1 - terminated) V(s')."""
    env, gamma = PROBES[name](N), 0.9
    state, obs = env.reset(jr.key(2))

    def q(action):
        _, step = env.step(eqx.tree_at(lambda s: s.key, state, jr.clone(state.key)), action)
        next_value = jax.vmap(lambda o: env.value(o, gamma))(step.next_obs)
        return step.reward + gamma * (1 - step.terminated) * next_value

    grid = np.asarray(jax.vmap(q)(jnp.linspace(-1, 1, 81)[:, None, None] * jnp.ones((1, N, 1))))
    best = np.asarray(q(jax.vmap(env.best_action)(obs)))
    assert (grid <= best + 1e-5).all()
    np.testing.assert_allclose(best, jax.vmap(lambda o: env.value(o, gamma))(obs), rtol=1e-5)
    if name in ("action", "obs-action"):
        assert (grid < best - 0.1).any(axis=0).all()


@pytest.mark.parametrize(("name", "distinct"), [("obs", 2), ("obs-action", N * T)])
def test_random_starts_differ_between_copies_and_episodes(name, distinct):
    run = rollout(PROBES[name](N), lambda obs: jnp.zeros((N, 1)))
    obs, _ = run(jr.key(3))
    assert len(np.unique(obs)) == distinct
    assert not np.array_equal(obs, run(jr.key(4))[0])


def test_truncation_probe_separates_the_two_treatments():
    """Tabular value iteration over the transitions of one rollout, once right and once with truncation as an end."""
    env, gamma = PROBES["truncation"](1), 0.9
    obs, step = rollout(env, lambda obs: jnp.zeros((1, 1)), steps=15)(jr.key(0))
    assert not step.terminated.any() and step.truncated.sum() == 3
    now, after = (np.round(np.asarray(x)[:, 0, 0] * 5).astype(int) for x in (obs, step.next_obs))
    assert set(after) <= set(now)  # the last successor is a state one acts in, so its value is learnt

    def learn(mask):
        v = np.zeros(5)
        for _ in range(500):
            v[now] = step.reward[:, 0] + gamma * (1 - mask[:, 0]) * v[after]
        return v

    states = jnp.arange(5)[:, None] / 5
    np.testing.assert_allclose(learn(step.terminated), 10, rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(lambda o: env.value(o, gamma))(states), 10, rtol=1e-5)
    wrong = jax.vmap(lambda o: mistaken_value(o, gamma))(states)
    np.testing.assert_allclose(learn(step.truncated), wrong, rtol=1e-5)
    np.testing.assert_allclose(wrong[0], sum(gamma**k for k in range(5)), rtol=1e-5)


def boltzmann_mean(reward, lam):
    """Mean of exp(r / lam) over [-1, 1]^2, on a grid of midpoints."""
    x = (jnp.arange(400) + 0.5) / 200 - 1
    grid = jnp.stack(jnp.meshgrid(x, x, indexing="ij"), axis=-1).reshape(-1, 2)
    weight = jax.nn.softmax(jax.vmap(reward)(grid) / lam)
    return np.asarray(weight @ grid), grid, np.asarray(weight)


def test_bandit_rewards():
    a = jnp.array([[0.5, -0.25, 1.0]])
    for reward, want in ((Flat(), 0.0), (Flat(2.0), 2.0), (Linear(0.5), 1.25)):
        env = Bandit(reward, 3, 1)
        _, step = env.step(env.reset(jr.key(0))[0], a)
        np.testing.assert_allclose(step.reward, [want])
        assert step.terminated.all()
    mean, *_ = boltzmann_mean(Linear(0.3), 0.3)
    np.testing.assert_allclose(mean, 1 / np.tanh(2) - 0.5, atol=1e-4)


def test_two_peaks_are_a_gaussian_mixture():
    reward = TwoPeak(lam=0.2, centre=0.5, width=0.1)
    mean, grid, weight = boltzmann_mean(reward, 0.2)
    np.testing.assert_allclose(mean, 0, atol=1e-5)
    right = np.asarray(grid.sum(axis=1) > 0)
    peak = (weight * right)[:, None] * np.asarray(grid) * 2
    np.testing.assert_allclose(peak.sum(axis=0), 0.5, atol=1e-3)
    spread = 2 * (weight * right) @ (np.asarray(grid) - 0.5) ** 2
    np.testing.assert_allclose(np.sqrt(spread), 0.1, atol=1e-3)
