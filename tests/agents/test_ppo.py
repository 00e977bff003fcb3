"""PPO, ReinFlow, DPPO, FPO: exact ratios, closed forms of their chains, reductions to each other."""

from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.agents.onpolicy.dppo import DPPO
from contraflow.agents.onpolicy.fpo import FPO
from contraflow.agents.onpolicy.ppo import PPO
from contraflow.agents.onpolicy.reinflow import ReinFlow
from contraflow.core.types import EnvSpec, Rollout
from contraflow.flow.kernel import chain_log_prob
from contraflow.rl.advantage import gae
from contraflow.rl.flow_policy import CLOCK, FlowPolicy
from contraflow.rl.normalise import RunningMoments
from contraflow.rl.ppo import Samples

SPEC = EnvSpec(3, 2, 4, 10, True)
SMALL = {"width": 16, "depth": 1, "minibatches": 2, "epochs": 2}
POLICY = FlowPolicy(width=16, depth=1, embedding=8)
AGENTS = {
    "ppo": PPO(**SMALL),
    "reinflow": ReinFlow(POLICY, **SMALL),
    "reinflow-sum": ReinFlow(POLICY, ratio="sum", steps=2, anchor=0.1, **SMALL),
    "dppo": DPPO(replace(POLICY, path=DPPO().policy.path, predict="noise", steps=6, clip=1.0), learned=3, **SMALL),
    "fpo": FPO(POLICY, **SMALL),
}


NAMES = [pytest.param(name, marks=pytest.mark.slow if name == "reinflow-sum" else ()) for name in AGENTS]


@partial(jax.jit, static_argnums=0)
def start(agent, key):
    return agent.init(key, SPEC)


@partial(jax.jit, static_argnums=0)
def _acts(agent, state, obs, keys):
    return jax.vmap(jax.vmap(lambda o, k: agent.sample(state, o, k)))(obs, keys)[1]


def acted(agent, state, key, T=6, N=4):
    """The rows of a rollout under `state`; what is random but the actions comes from NumPy, which compiles nothing."""
    rng = np.random.default_rng(int(jr.key_data(key)[-1]))
    obs, following = (jnp.asarray(rng.normal(size=(T, N, 3)), jnp.float32) for _ in range(2))
    end, reward = jnp.asarray(rng.random((2, T, N)) < 0.2), jnp.asarray(rng.normal(size=(T, N)), jnp.float32)
    extras = _acts(agent, state, obs, jr.split(key, (T, N)))
    return Rollout(obs, extras, reward, following, end[0], end[1], jnp.ones((T, N), bool))


@jax.jit
def samples(state, r):
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (r.obs, r.extras, r.reward))
    obs, extras, advantage = flat
    return Samples(jax.vmap(state.stats)(obs), extras, advantage, advantage, jnp.ones(len(advantage)))


@pytest.mark.parametrize("name", NAMES)
def test_the_first_ratio_is_one(name: str):
    """What acting remembered is what the update computes anew: any other grid, clip or clamp would show here."""
    agent = AGENTS[name]
    state = start(agent, jr.key(0))
    r = acted(agent, state, jr.key(1))
    args = (state.reference,) if name.startswith("reinflow") else ()
    loss, metrics = jax.jit(lambda a, b, k: agent._surrogate(a, b, k, *args))(state.actor, samples(state, r), jr.key(2))
    assert metrics["clip_share"] == 0 and abs(float(metrics["kl"])) < 1e-6
    assert np.isfinite(loss)


def test_the_first_minibatch_of_an_update():
    """One pass in one minibatch: the policy that acted is the one that learns, whatever the statistics are."""
    agent = replace(AGENTS["ppo"], epochs=1, minibatches=1)
    state = start(agent, jr.key(0))
    state = replace(
        state, stats=RunningMoments(jnp.array([1.0, -2.0, 0.5]), jnp.array([4.0, 0.25, 1.0]), jnp.asarray(9.0))
    )
    r = acted(agent, state, jr.key(1))
    new, metrics = jax.jit(agent.update)(state, r, jr.key(2))
    assert abs(float(metrics["kl"])) < 1e-6 and metrics["clip_share"] == 0
    assert new.stats.count == 9 + 24


@pytest.mark.parametrize("name", NAMES)
def test_an_update_moves_what_it_should(name: str):
    agent = AGENTS[name]
    state = start(agent, jr.key(0))
    r = acted(agent, state, jr.key(1))
    new, metrics = jax.jit(agent.update)(state, r, jr.key(2))
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)  # weak types too: nothing compiles twice
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state, new)
    assert all(x > 0 for x in jax.tree.leaves(moved.critic)) and max(jax.tree.leaves(moved.actor)) > 0
    assert new.step == 1 and all(np.isfinite(float(x)) for x in metrics.values())
    assert metrics["updates"] == 4
    if new.reference is not None:
        assert max(jax.tree.leaves(moved.reference)) == 0
    assert (max(jax.tree.leaves(moved.stats)) > 0) == agent.normalise_obs


def test_gae_by_hand():
    """Two environments: one terminates, one is truncated; nothing leaks from the next episode, and a cut bootstraps."""
    reward = jnp.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    value, following = jnp.full((3, 2), 0.5), jnp.full((3, 2), 10.0)
    terminated = jnp.array([[False, False], [True, False], [False, False]])
    truncated = jnp.array([[False, False], [False, True], [False, False]])
    got = gae(reward, value, following, terminated, truncated, 0.9, 0.8)
    last = 3 + 9 - 0.5
    np.testing.assert_allclose(got[2], [last, last], rtol=1e-6)
    np.testing.assert_allclose(got[1], [2 - 0.5, 2 + 9 - 0.5], rtol=1e-6)
    np.testing.assert_allclose(got[0], [9.5 + 0.72 * 1.5, 9.5 + 0.72 * 10.5], rtol=1e-6)


class Pull(eqx.Module):
    """v(x, t, s) = mu(s) - x: one step of size one goes to mu(s), wherever it began."""

    weight: jax.Array

    @property
    def dim(self):
        return self.weight.shape[1]

    def __call__(self, x, t, cond):
        return cond @ self.weight - x


def test_reinflow_with_one_step_is_gaussian_ppo():
    """Same means and deviations: same ratios, same surrogate, whatever x_0 was."""
    std, weight = 0.2, jr.normal(jr.key(0), (3, 2))
    agent = ReinFlow(POLICY, steps=1, ratio="sum", std=(std, std), entropy=0.0, clip=0.2, **SMALL)
    state = start(agent, jr.key(1))
    old = eqx.tree_at(lambda a: a.velocity, state.actor, Pull(weight), is_leaf=lambda x: x is state.actor.velocity)
    new = eqx.tree_at(lambda a: a.velocity.weight, old, weight + 0.05 * jr.normal(jr.key(2), weight.shape))
    state = replace(state, actor=old)
    r = acted(agent, state, jr.key(3))
    batch = samples(state, r)
    loss, metrics = jax.jit(lambda a: agent._surrogate(a, batch, jr.key(4), None))(new)

    ppo = PPO(clip=0.2, **SMALL)
    x = batch.extras.chain[:, 1]

    def log_prob(w):
        return jnp.sum(-0.5 * ((x - batch.obs @ w) / std) ** 2, 1)

    ratio = jnp.exp(log_prob(new.velocity.weight) - log_prob(weight))
    wanted = -jnp.minimum(ratio * batch.advantage, jnp.clip(ratio, 0.8, 1.2) * batch.advantage).mean()
    np.testing.assert_allclose(loss, wanted, rtol=1e-4)
    np.testing.assert_allclose(metrics["clip_share"], jnp.mean(jnp.abs(ratio - 1) > ppo.clip), atol=1e-6)
    assert 0.05 < metrics["clip_share"] < 0.95


def test_the_mean_ratio_is_the_true_one_spread_over_its_factors():
    """log rho / (K n), also for densities far above 1: small deviations are where a clamp would stop all learning."""
    agent = ReinFlow(POLICY, steps=2, std=(0.02, 0.02), entropy=0.0, **SMALL)
    state = start(agent, jr.key(1))
    new = eqx.tree_at(lambda a: a.velocity.last.bias, state.actor, jnp.array([0.002, -0.001]))
    r = acted(agent, state, jr.key(3))
    batch = samples(state, r)

    def log_ratio(a):
        def one(obs, draw):
            return jnp.sum(chain_log_prob(agent._kernel(a, obs), draw.chain, range(2)) - draw.log_prob)

        return jax.vmap(one)(batch.obs, batch.extras)

    true = jax.jit(log_ratio)(new)
    assert float(jnp.abs(true).max()) > 0.02
    for ratio, factors in (("sum", 1.0), ("mean", 4.0)):
        kl = jnp.mean(jnp.exp(true / factors) - 1 - true / factors)
        chosen = replace(agent, ratio=ratio)
        metrics = jax.jit(lambda a, chosen=chosen: chosen._surrogate(a, batch, jr.key(4), None)[1])(new)
        np.testing.assert_allclose(metrics["kl"], kl, rtol=0.05, atol=1e-6)


def test_dppo_with_one_step_is_gaussian_ppo():
    """Learning only the last step: N(predicted x1, min_std^2), for the x that the others led to."""
    agent = replace(AGENTS["dppo"], learned=1, ratio="sum", gamma_denoise=0.5, clip=0.2, min_std=0.3)
    state = start(agent, jr.key(1))
    new = jax.tree.map(lambda w: w + 0.1 * jr.normal(jr.key(5), w.shape), state.actor)
    r = acted(agent, state, jr.key(3))
    batch = samples(state, r)
    loss, metrics = jax.jit(lambda a: agent._surrogate(a, batch, jr.key(4)))(new)
    t = jnp.asarray(5 / 6)

    def log_prob(net):
        before, x = batch.extras.chain[:, 0], batch.extras.chain[:, 1]
        x1, _ = jax.vmap(lambda b, o: agent.policy.ends(net, b, t, jnp.asarray(1.0), o))(before, batch.obs)
        return jnp.sum(-0.5 * ((x - x1) / 0.3) ** 2, 1)

    ratio = jnp.exp(log_prob(new) - log_prob(state.actor))
    wanted = -jnp.minimum(ratio * batch.advantage, jnp.clip(ratio, 0.8, 1.2) * batch.advantage).mean()
    np.testing.assert_allclose(loss, wanted, rtol=1e-3)
    assert 0.0 < metrics["clip_share"] < 1.0


def test_reinflow_without_noise_is_the_ode():
    """As sigma -> 0 acting in training becomes acting in evaluation, from the same x_0."""
    agent = ReinFlow(POLICY, std=(1e-6, 1e-6), **SMALL)
    state = start(agent, jr.key(0))
    obs, key = jnp.ones(3), jr.key(1)
    _, draw = agent.sample(state, obs, key)
    x1 = agent.policy(state.actor.velocity, draw.chain[0], state.stats(obs), agent.steps)
    np.testing.assert_allclose(draw.chain[-1], x1, atol=1e-4)


def test_noise_stays_within_its_bounds_and_its_reach_falls():
    agent = ReinFlow(POLICY, std=(0.1, 0.3), std_end=0.5, std_rollouts=100, **SMALL)
    state = start(agent, jr.key(0))
    wild = jax.tree.map(lambda w: 2 * jr.normal(jr.key(1), w.shape), state.actor.noise)
    actor = replace(state.actor, noise=wild)
    std = jax.vmap(lambda o: agent._std(actor, jnp.asarray(2), o))(20 * jr.normal(jr.key(2), (50, 3)))
    assert std.min() >= 0.0999 and std.max() <= 0.3001 and std.max() - std.min() > 0.1
    reach = [float(jnp.exp(0.5 * agent._reach(n))) for n in (0, 35, 67.5, 100, 200)]
    np.testing.assert_allclose(reach, [0.3, 0.3, 0.25, 0.2, 0.2], atol=1e-6)


class GaussianFlow(eqx.Module):
    """The velocity of the flow to N(mean, std^2), whatever the condition."""

    mean: jax.Array
    std: float = eqx.field(static=True, default=0.5)

    @property
    def dim(self):
        return self.mean.shape[0]

    def __call__(self, x, t, cond):
        t = t / CLOCK
        var = t**2 * self.std**2 + (1 - t) ** 2
        return self.mean + (t * self.std**2 - (1 - t)) / var * (x - t * self.mean)


@pytest.mark.parametrize(("weight", "exact"), [("elbo", True), ("velocity", False)])
def test_fpo_ratio_against_the_density(weight: str, exact: bool):
    """With the ELBO's weight and sums, the ratio between two Gaussian flows is that of their densities."""
    agent = FPO(POLICY, weight=weight, ratio="sum", pairs=20_000, **SMALL)
    old, new = GaussianFlow(jnp.array([0.0, 0.1])), GaussianFlow(jnp.array([0.4, -0.3]))
    t = jr.uniform(jr.key(0), (agent.pairs,), minval=1e-3, maxval=1 - 1e-3)
    noise = jr.normal(jr.key(1), (agent.pairs, 2))
    for x in (jnp.array([0.3, 0.2]), jnp.array([-0.5, 0.4])):
        log_ratio = jnp.mean(
            agent._losses(old, jnp.zeros(3), x, t, noise) - agent._losses(new, jnp.zeros(3), x, t, noise)
        )
        true = 0.5 * jnp.sum(((x - old.mean) / 0.5) ** 2 - ((x - new.mean) / 0.5) ** 2)
        assert (abs(float(log_ratio - true)) < 0.045) == exact


def test_fpo_survives_an_outlier():
    """The ELBO's weight reaches 1000: the loss of an action may fall by more than exp can take."""
    agent = replace(AGENTS["fpo"], weight="elbo", ratio="sum")
    state = start(agent, jr.key(0))
    batch = samples(state, acted(agent, state, jr.key(1)))
    fallen = eqx.tree_at(lambda b: b.extras.loss, batch, batch.extras.loss + 1e4)
    surrogate = eqx.filter_jit(eqx.filter_value_and_grad(agent._surrogate, has_aux=True))
    (loss, metrics), grad = surrogate(state.actor, fallen, jr.key(2))
    assert metrics["clip_share"] > 0.9
    assert np.isfinite(loss) and all(np.isfinite(x).all() for x in jax.tree.leaves(grad))
