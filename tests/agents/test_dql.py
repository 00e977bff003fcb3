"""Diffusion-QL against its closed forms: the schedule, the sampler of a Gaussian, a gradient free of the scale of Q."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.agents.agent_helpers import Frozen, GaussianNoise, with_slope
from tests.closeness import assert_close

from contraflow.agents.offline.dql import DIFFUSION, DQL
from contraflow.core.optim import Optim, gradient_step
from contraflow.core.types import Batch, EnvSpec
from contraflow.flow.model import Ddpm, Flow
from contraflow.flow.path import VP
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.base import Cost
from contraflow.policy.best_of import Softmax
from contraflow.rl.critics import Critics

D, K = 3, 3
SPEC = EnvSpec(1, D, 1, None, False)
SMALL = DQL(
    flow=replace(DIFFUSION, solver=Ddpm(K), network=ResidualMLP(8, 1, 4)),
    critic=Critics(width=8, depth=1, tau=0.1, optim=Optim(1e-3)),
    optim=Optim(1e-2),
)
FROZEN = replace(SMALL, critic=Frozen(**vars(SMALL.critic)))
SLOPES = np.array([[0.5, -1.0, 2.0], [1.0, 1.5, -0.5]])


def batch(key, n=16, mask=None):
    k_action, k_reward, k_obs = jr.split(key, 3)
    action = jnp.clip(0.3 + 0.2 * jr.normal(k_action, (n, D)), -1, 1)
    mask = jnp.ones((n, D)) if mask is None else mask
    obs = jr.normal(k_obs, (n, 1))
    return Batch(obs, action, jr.normal(k_reward, (n,)), jnp.full(n, 0.9), -obs, mask)


def fresh(agent):
    return jax.jit(lambda k: agent.init(k, SPEC))(jr.key(0))


def discrete(steps, b_min=0.1, b_max=10.0):
    """beta_k of the released schedule, k = 1..K from data to noise."""
    k = np.arange(1, steps + 1)
    return 1 - np.exp(-b_min / steps - 0.5 * (b_max - b_min) * (2 * k - 1) / steps**2)


@pytest.mark.parametrize("steps", [5, 10, 100])
def test_the_path_is_the_discrete_schedule(steps):
    """alpha_t^2 = prod_{j<=k} (1 - beta_j) at t = 1 - k/K; so .00641 = exp(-(b_min + b_max) / 2) at the noise, for
    every K."""
    product = np.cumprod(1 - discrete(steps))
    t = jnp.asarray(1 - np.arange(1, steps + 1) / steps, jnp.float32)
    np.testing.assert_allclose(DIFFUSION.path.alpha(t) ** 2, product, rtol=1e-4)  # float32 of exponents up to 5
    np.testing.assert_allclose(product[-1], np.exp(-5.05), rtol=1e-6)
    assert f"{product[-1]:.5f}" == "0.00641"


@pytest.mark.parametrize("wide", [False, True])
def test_the_sampler_of_a_gaussian_is_an_affine_recursion(wide):
    """Data N(m, s^2) and the exact prediction of noise: mean and variance after each step of DDPM in its own terms,
    abar and beta_k, from N(0, 1)."""
    steps, m, s = 5, 0.3, 0.4
    flow = replace(DIFFUSION, solver=Ddpm(steps, wide), clip=None)
    flow = Flow(GaussianNoise(flow.path, 2, m, s), flow)
    beta = discrete(steps)
    abar = np.cumprod(1 - beta)
    mean, var = 0.0, 1.0
    for k in reversed(range(steps)):
        before = abar[k - 1] if k else 1.0
        gain = np.sqrt(1 - abar[k]) / (abar[k] * s**2 + 1 - abar[k])  # eps = gain (x - sqrt(abar) m)
        # Where the network is asked at t = 0, x1 is read off it at t = .001 (`EDGE`).
        read = abar[k] if k < steps - 1 else float(VP(0.1, 10.0).alpha(jnp.asarray(1e-3))) ** 2
        # x1 = p x + q
        p = (1 - np.sqrt(1 - read) * gain) / np.sqrt(read)
        q = np.sqrt(1 - read) * gain * np.sqrt(abar[k]) * m / np.sqrt(read)
        c1 = np.sqrt(before) * beta[k] / (1 - abar[k])
        c2 = np.sqrt(1 - beta[k]) * (1 - before) / (1 - abar[k])
        # With x0 read off at t = .001 too, the mean is alpha_r x1 + sqrt(beta_r^2 - std^2) x0.
        if read != abar[k]:
            noise = np.sqrt(1 - before) ** 2 - beta[k] * (1 - before) / (1 - abar[k])
            slope = np.sqrt(before) * p + np.sqrt(noise) * gain
            shift = np.sqrt(before) * q - np.sqrt(noise) * gain * np.sqrt(abar[k]) * m
        else:
            slope, shift = c1 * p + c2, c1 * q
        added = 0.0 if k == 0 else beta[k] if wide else beta[k] * (1 - before) / (1 - abar[k])
        mean, var = slope * mean + shift, slope**2 * var + added
    n = 20_000
    x1 = jax.jit(lambda key: flow.particles(jnp.zeros(1), key, n)[1])(jr.key(1))
    assert_close(x1.mean(0), mean, 4 / n**0.5, scale=var**0.5)  # four standard errors
    assert_close(x1.var(0), var, 4 * (2 / n) ** 0.5)


def test_the_sampler_needs_a_key():
    flow = Flow(GaussianNoise(DIFFUSION.path, 2, 0.3, 0.4), DIFFUSION)
    with pytest.raises(ValueError, match="pass key"):
        flow.sample(jnp.zeros(2), jnp.zeros(1))
    assert DIFFUSION.solver.nfe == 5
    with pytest.raises(ValueError, match="steps"):
        Ddpm(0)


def test_the_actor_by_hand():
    """The whole loss and its gradient, the sampler written in the terms of DDPM, unrolled."""
    agent = replace(FROZEN, eta=0.7)
    state = with_slope(fresh(agent), SLOPES)
    rows, beta = batch(jr.key(1)), jnp.asarray(discrete(K), jnp.float32)
    abar = jnp.cumprod(1 - beta)
    new, metrics = jax.jit(agent.update)(state, rows, jr.key(2))

    def loss(actor):
        *_, k_noise, k_now, k_pair = jr.split(jr.key(2), 5)

        def cloning(obs, action, key):
            k_eps, k_level = jr.split(key)
            t, eps = jr.randint(k_level, (), 0, K), jr.normal(k_eps, (D,))
            a = abar[K - 1 - t]
            x = jnp.sqrt(a) * action + jnp.sqrt(1 - a) * eps
            return jnp.mean((actor.net(x, 5.0 * t / K, obs) - eps) ** 2)

        def act(obs, key):
            x, noise = jr.normal(key, (D,)), jr.normal(jr.fold_in(key, 1), (K, D))
            for i in range(K):
                k = K - 1 - i
                before = abar[k - 1] if k else jnp.ones(())
                eps = actor.net(x, jnp.asarray(5.0 * i / K), obs)
                a = agent.flow.path.alpha(jnp.asarray(1e-3)) ** 2 if i == 0 else abar[k]
                x1 = jnp.clip((x - jnp.sqrt(1 - a) * eps) / jnp.sqrt(a), -1.0, 1.0)
                mean = jnp.sqrt(before) * beta[k] / (1 - abar[k]) * x1
                mean += jnp.sqrt(1 - beta[k]) * (1 - before) / (1 - abar[k]) * x
                x = mean + jnp.sqrt(beta[k] * (1 - before) / (1 - abar[k])) * noise[i]
            return jnp.clip(x, -1.0, 1.0)

        q = jax.vmap(act)(rows.obs, jr.split(k_now, 16)) @ jnp.asarray(SLOPES.T, jnp.float32)
        i, j = jr.permutation(k_pair, 2)
        clone = jnp.mean(jax.vmap(cloning)(rows.obs, rows.action, jr.split(k_noise, 16)))
        return clone - 0.7 * q[:, i].mean() / jax.lax.stop_gradient(jnp.abs(q[:, j]).mean())

    want = jax.jit(lambda actor, opt: gradient_step(agent.optim.tx, loss, actor, opt))(state.actor, state.actor_opt)
    # Differences of numbers up to the 1 / sqrt(abar_K) = 12.5 by which the first step amplifies.
    np.testing.assert_allclose(metrics["actor_loss"], want[2], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(metrics["actor_grad_norm"], want[3], rtol=1e-3)
    assert any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (new.actor, state.actor)), strict=True))


@pytest.mark.parametrize("scale", [1024.0, 3.0])
def test_the_actor_does_not_see_the_scale_of_its_critics(scale):
    """Exactly: by a power of two not a bit differs, by another factor the last ones do."""
    state = fresh(FROZEN)
    update = jax.jit(FROZEN.update)
    one, _ = update(with_slope(state, SLOPES), batch(jr.key(1)), jr.key(2))
    large, _ = update(with_slope(state, scale * SLOPES), batch(jr.key(1)), jr.key(2))
    for a, b in zip(*map(jax.tree.leaves, (one.actor_opt, large.actor_opt)), strict=True):
        if scale == 1024.0:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max())
    other, _ = update(with_slope(state, -SLOPES), batch(jr.key(1)), jr.key(2))
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (one.actor, other.actor)), strict=True)]
    assert max(moved) > 1e-3


def test_without_q_it_is_cloning():
    """eta = 0: bit for bit the same whatever the critics and rewards; and the loss of DDPM."""
    agent = replace(SMALL, eta=0.0)
    state, rows, update = fresh(agent), batch(jr.key(1)), jax.jit(agent.update)
    new, metrics = update(state, rows, jr.key(2))
    other, _ = update(with_slope(state, SLOPES), replace(rows, reward=5 * rows.reward), jr.key(2))
    jax.tree.map(np.testing.assert_array_equal, (new.actor, new.actor_opt), (other.actor, other.actor_opt))

    def loss(actor):
        def one(obs, action, key):
            k_eps, k_level = jr.split(key)
            t, eps = jr.randint(k_level, (), 0, K) / K, jr.normal(k_eps, (D,))
            x = agent.flow.path.alpha(t) * action + agent.flow.path.beta(t) * eps
            return jnp.mean((actor.net(x, 5.0 * t, obs) - eps) ** 2)

        return jnp.mean(jax.vmap(one)(rows.obs, rows.action, jr.split(jr.split(jr.key(2), 5)[2], 16)))

    want = jax.jit(lambda actor, opt: gradient_step(agent.optim.tx, loss, actor, opt))(state.actor, state.actor_opt)
    np.testing.assert_allclose(metrics["actor_loss"], want[2], rtol=1e-5)
    np.testing.assert_allclose(metrics["actor_grad_norm"], want[3], rtol=1e-5)


def test_targets_are_the_least_of_what_each_critic_finds_best():
    """y = r + discount min_j max_n Q_j(s', a'_n), a'_n of the average, not of the actor."""
    agent = replace(SMALL, backup=4)
    state = with_slope(fresh(agent), SLOPES)
    state = replace(state, average=jax.tree.map(lambda x: 2 * x, state.actor))
    rows = batch(jr.key(1))
    _, metrics = jax.jit(agent.update)(state, rows, jr.key(2))

    @jax.jit
    def value(state):
        def one(obs, key):
            a = jnp.clip(state.average.particles(obs, key, 4)[1], -1, 1)
            return jnp.min(jnp.max(a @ jnp.asarray(SLOPES.T, jnp.float32), 0))

        following = jax.vmap(one)(rows.next_obs, jr.split(jr.split(jr.key(2), 5)[0], 16))
        return jnp.mean(rows.reward + rows.discount * following)

    np.testing.assert_allclose(metrics["q"], value(state), rtol=1e-3)  # of values up to 3.5, lifted by 35


def test_masked_actions_are_not_cloned():
    """Where the third action of every row is masked nothing moves what the network says of it."""
    agent = replace(FROZEN, eta=0.0)
    state = fresh(agent)
    new, _ = jax.jit(agent.update)(state, batch(jr.key(1), mask=jnp.ones((16, D)).at[:, 2].set(0.0)), jr.key(2))
    moved = new.actor.net.last.bias - state.actor.net.last.bias
    assert moved[2] == 0 and jnp.abs(moved[:2]).min() > 1e-3


def test_one_of_fifty_is_taken_by_the_slow_critics():
    state = fresh(SMALL)
    state = replace(state, target=jax.tree.map(lambda x: x + 1, state.target))
    policy = SMALL.policy(state)
    assert policy.explore == policy.greedy == Softmax(50) and policy.temperature == 1.0
    assert policy.critic is state.target and policy.policy.flow is state.actor
    assert policy.cost == Cost(50, K, 50)


def test_the_average_follows_quickly_at_first():
    """By 1 - min(.999, (1 + n) / (10 + n)) at update n = 0, 1, ..."""
    state, update = fresh(SMALL), jax.jit(SMALL.update)
    want = state.average.net.last.bias
    for n in range(3):
        state, _ = update(state, batch(jr.key(n)), jr.key(10 + n))
        rate = (1 + n) / (10 + n)
        want = rate * want + (1 - rate) * state.actor.net.last.bias
        np.testing.assert_allclose(state.average.net.last.bias, want, rtol=1e-5, atol=1e-7)
    late = replace(state, step=jnp.asarray(10**6, jnp.int32))
    new, _ = update(late, batch(jr.key(5)), jr.key(6))
    gap = new.average.net.last.bias - state.average.net.last.bias
    np.testing.assert_allclose(
        gap, 1e-3 * (new.actor.net.last.bias - state.average.net.last.bias), rtol=0.01, atol=1e-7
    )


def test_settings_that_make_no_sense_are_refused():
    for wrong, said in (({"critic": Critics(members=1)}, "members"), ({"eta": -1.0}, "eta"), ({"backup": 0}, "backup")):
        with pytest.raises(ValueError, match=said):
            replace(SMALL, **wrong)
