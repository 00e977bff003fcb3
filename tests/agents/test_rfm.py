"""RFM: one update against an independently written one on the same keys, the official rule in NumPy, acting, backup."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from contraflow.agents.online.rfm import RFM
from contraflow.core.types import EnvSpec, Transition
from contraflow.flow.likelihood import Denoising, Pushforward, denoising_log_density
from contraflow.flow.path import VE
from contraflow.flow.posterior.control import Fixed, MinVariance
from contraflow.flow.posterior.importance import Reverse
from contraflow.flow.posterior.proposal import Mixture, Noise, TruncatedNoise
from contraflow.flow.solver import Euler
from contraflow.nets.critic import QEnsemble
from contraflow.policy.select import Argmax, First, Softmax
from contraflow.presets import RFM_PAPER
from contraflow.rl.critics import Critics
from contraflow.rl.energy import boltzmann
from contraflow.rl.temperature import Constant

SPEC = EnvSpec(3, 2, 4, 10, True)
B, LAM = 3, 0.5
BASE = RFM(
    width=8, depth=1, embedding=4, estimator=Reverse(8, Mixture(), Fixed(0.0)), solver=Euler(2), explore=Softmax(4),
    backup=Softmax(4), query=Softmax(4), greedy=Argmax(4),
    temperature=Constant(LAM), actor_lr=1e-2, base=0.7, max_grad_norm=0.5,
    critic=Critics(width=8, depth=1, lr=1e-2, tau=0.1, max_grad_norm=0.5),
)  # fmt: skip


def batch(seed=0):
    k = jr.split(jr.key(seed), 6)
    return Transition(
        jr.normal(k[0], (B, 3)), jr.uniform(k[1], (B, 2), minval=-1.0, maxval=1.0), jr.normal(k[2], (B,)),
        jr.normal(k[3], (B, 3)), jr.bernoulli(k[4], 0.5, (B,)), jr.bernoulli(k[5], 0.5, (B,)),
        jnp.ones(B, int),
    )  # fmt: skip


def start(agent, seed=0):
    """A first state whose target is not the critic, so that it matters which of the two is asked."""
    state = jax.jit(lambda k: agent.init(k, SPEC))(jr.key(seed))
    other = jax.jit(lambda k: QEnsemble(2, 3, 2, agent.width, agent.depth, key=k))(jr.key(seed + 50))
    return eqx.tree_at(lambda s: s.target, state, other)


def expected(agent, state, data, key):
    """(y, actor loss, gradient, new critic) of one update on the linear path, written out sample by sample."""
    k_next, k_now, k_t, k_x0, k_posterior, _, k_density = jr.split(jr.clone(key), 7)
    keys_next, keys_now, keys_mc, keys_density = (jr.split(k, B) for k in (k_next, k_now, k_posterior, k_density))
    soft = agent.bounds == "box"  # then also: the actor returns noise, and the backup is soft
    bounded = (lambda u: jnp.clip(u, -1, 1)) if soft else jnp.tanh

    def velocity(x, t, obs):
        out = state.actor(x, t, obs)
        return (jnp.clip((x - (1 - t) * out) / t, -1, 1) - x) / (1 - t) if soft else out

    def end(x, obs):
        dt = (1 - 2 * agent.t_min) / agent.solver.steps
        for i in range(agent.solver.steps):
            x = x + dt * velocity(x, jnp.asarray(agent.t_min + i * dt), obs)
        return x

    def particles(obs, key):
        k_x0, k_pick = jr.split(key)
        x0 = jr.normal(k_x0, (agent.backup.particles, 2))
        u = jax.vmap(lambda x: end(x, obs))(x0)
        score = jax.vmap(lambda u: state.critic(obs, bounded(u)).min())(u) / LAM
        return x0, u, jr.categorical(k_pick, score)

    def log_prob(x0, u, obs, key):
        if isinstance(agent.density, Pushforward):
            (a, b), (c, d) = jax.jacfwd(end)(x0, obs)
            return jax.scipy.stats.norm.logpdf(x0).sum() - jnp.log(jnp.abs(a * d - b * c))
        x0_mean = lambda x, t: x - t * velocity(x, t, obs)
        return denoising_log_density(x0_mean, agent.path, u, agent.t_min, 1 - agent.t_min, 3, 2, key)

    y, x1, ended = [], [], np.asarray(data.terminated)
    for b in range(B):
        x0, u, i = particles(data.next_obs[b], keys_next[b])
        bootstrap = 0.0 if ended[b] else state.target(data.next_obs[b], bounded(u[i])).min()
        if soft and not ended[b]:
            bootstrap -= LAM * log_prob(x0[i], u[i], data.next_obs[b], keys_density[b])
        y.append(data.reward[b] + agent.critic.gamma * bootstrap)
        _, u, i = particles(data.obs[b], keys_now[b])
        x1.append(u[i] if agent.endpoint == "policy" else data.action[b] if soft else jnp.arctanh(data.action[b]))
    y = jnp.stack(y)

    members = []
    for i in range(2):
        member = jax.tree.map(lambda leaf, i=i: leaf[i], state.critic.members)
        tx = optax.chain(optax.clip_by_global_norm(agent.max_grad_norm), optax.adam(agent.critic.lr))
        grad = jax.grad(lambda q: jnp.mean((jax.vmap(q)(data.obs, data.action)[:, 0] - y) ** 2))(member)
        members.append(eqx.apply_updates(member, tx.update(grad, tx.init(member))[0]))
    critic = lambda obs, a: jnp.minimum(*(q(obs, a)[0] for q in members))

    t = jr.uniform(k_t, (B,), minval=agent.t_min, maxval=1 - agent.t_min)
    x0 = jr.normal(k_x0, (B, 2))
    x_t = jnp.stack([t[b] * x1[b] + (1 - t[b]) * x0[b] for b in range(B)])
    targets = []
    for b in range(B):
        log_pi = boltzmann(lambda a, b=b: critic(data.obs[b], a), jnp.asarray(LAM), agent.base)
        if soft:
            log_pi = lambda u, b=b: critic(data.obs[b], u) / LAM  # candidates lie in the box
        mean = agent.estimator(keys_mc[b], agent.path, log_pi, x_t[b], t[b]).mean
        targets.append((x_t[b] - t[b] * mean if soft else mean - x_t[b]) / (1 - t[b]))

    def loss(actor):
        v = jnp.stack([actor(x_t[b], t[b], data.obs[b]) for b in range(B)])
        return jnp.mean((v - jnp.stack(targets)) ** 2)

    return (y, *jax.value_and_grad(loss)(state.actor), members)


SOFT = {
    "bounds": "box", "predict": "noise", "density": Denoising(3, 2), "endpoint": "buffer",
    "estimator": Reverse(8, TruncatedNoise(), Fixed(0.0)),
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"endpoint": "policy"}, id="policy"),
        pytest.param({"endpoint": "buffer"}, id="buffer", marks=pytest.mark.slow),
        pytest.param(SOFT, id="soft"),
        pytest.param(SOFT | {"density": Pushforward()}, id="pushforward"),
    ],
)
def test_update_against_an_independent_one(change):
    agent = replace(BASE, **change)
    state, data = start(agent), batch()
    new, metrics = jax.jit(agent.update)(state, data, jr.key(7))
    y, loss, grad, members = jax.jit(lambda s, k: expected(agent, s, data, k))(state, jr.key(7))
    np.testing.assert_allclose(metrics["q"], y.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["actor_loss"], loss, rtol=1e-3)
    np.testing.assert_allclose(metrics["temperature"], LAM, rtol=1e-6)
    for i, member in enumerate(members):
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-3, atol=2e-5), new.critic.members, member
        )
    # Adam's first step has the size of the rate whatever the gradient, so its direction is compared where it is clear.
    norm = optax.tree.norm(grad)
    np.testing.assert_allclose(metrics["actor_grad_norm"], norm, rtol=1e-3)
    tx = optax.chain(optax.clip_by_global_norm(agent.max_grad_norm), optax.adam(agent.actor_lr))
    actor = eqx.apply_updates(state.actor, tx.update(grad, tx.init(state.actor))[0])

    def compare(a, b, g):
        clear = np.abs(g) > 1e-3 * float(norm)
        np.testing.assert_allclose(np.asarray(a)[clear], np.asarray(b)[clear], atol=1e-4)

    jax.tree.map(compare, new.actor, actor, grad)


def test_paper_estimator_is_the_official_rule():
    """Velocity targets on shared noise: the official NumPy-style rule with the gradient of a known Q by hand."""
    lam, slope = 0.3, np.array([1.0, -0.5])
    estimator = RFM_PAPER.estimator
    assert (estimator.samples, estimator.proposal, estimator.control) == (100, Noise(), MinVariance())
    q = lambda a: a @ jnp.asarray(slope, jnp.float32) - jnp.sum(a**2)
    log_pi = boltzmann(q, jnp.asarray(lam), RFM_PAPER.base)
    run = jax.jit(lambda k, x_t, t: estimator(k, RFM_PAPER.path, log_pi, x_t, t).mean)
    for i, t in enumerate((0.2, 0.5, 0.8, 0.95)):
        x_t = np.asarray(jr.normal(jr.key(i), (2,)), float)
        got = np.asarray(run(jr.key(10 + i), jnp.asarray(x_t, jnp.float32), jnp.asarray(t)), float)
        x0 = np.asarray(jr.normal(jr.key(10 + i), (100, 2)), float)
        u = (x_t - (1 - t) * x0) / t
        a = np.tanh(u)
        log_p = (a @ slope - (a**2).sum(1)) / lam + np.sum(-2 * (np.logaddexp(u, -u) - np.log(2)), 1)
        score = t / (1 - t) * x0 + (slope - 2 * a) * (1 - a**2) / lam - 2 * a
        w = np.exp(log_p - log_p.max())
        w = w / w.sum()
        dx, ds = u - w @ u, score - w @ score
        c = -np.sum(w[:, None] ** 2 * dx * ds, 0) / (np.sum(w[:, None] ** 2 * ds**2, 0) + 1e-4)
        mean = w @ u + np.clip(c, -2, 2) * (w @ score)
        np.testing.assert_allclose((got - x_t) / (1 - t), (mean - x_t) / (1 - t), rtol=5e-3, atol=5e-3)


def test_paper_settings():
    """Every official default of the paper's code (2601.08136)."""
    p = RFM_PAPER
    assert (p.solver, p.t_min, p.base, p.endpoint, p.behaviour) == (Euler(10), 0.01, 1.0, "policy", None)
    assert (p.explore, p.backup, p.query, p.greedy) == (Softmax(32), Softmax(32), Softmax(32), Argmax(32))
    assert (p.temperature, p.condition_on_temperature) == (Constant(0.02), True)
    assert (p.critic.gamma, p.critic.tau, p.critic.members) == (0.99, 0.005, 2)
    assert (p.width, p.depth, p.embedding, p.critic.width, p.critic.depth) == (256, 2, 128, 256, 2)
    assert (p.actor_lr, p.critic.lr, p.decay_steps, p.critic.decay_steps) == (3e-4, 1e-3, None, None)
    assert p.max_grad_norm == p.critic.max_grad_norm == 10.0


def latents(state, agent, obs, key, particles):
    """Euler by hand from the noise that `act` draws."""
    x = agent.path.source_scale * jr.normal(jr.split(jr.clone(key))[0], (particles, 2))
    dt = (1 - 2 * agent.t_min) / agent.solver.steps
    for i in range(agent.solver.steps):
        x = x + dt * jax.vmap(lambda y, i=i: state.actor(y, jnp.asarray(agent.t_min + i * dt), obs))(x)
    return x


@pytest.mark.parametrize("path", [BASE.path, VE()])
def test_exploit_takes_the_best_particle(path):
    agent, obs, key = replace(BASE, path=path), jnp.array([0.1, -0.4, 1.0]), jr.key(3)
    state = start(agent)
    u = latents(state, agent, obs, key, 4)
    values = [state.critic(obs, jnp.tanh(x)).min() for x in u]
    best = jnp.tanh(u[int(np.argmax(values))])
    np.testing.assert_allclose(jax.jit(agent.act, static_argnums=3)(state, obs, key, False), best, atol=1e-5)
    worst = [state.critic(obs, jnp.tanh(x)).max() for x in u]
    assert np.ptp(values) > 1e-3 and not np.allclose(values, worst)


def test_explore_picks_at_the_behaviour_temperature():
    """Cold behaviour: the best of four; hot behaviour: any of them. The temperature of the target law plays no part."""
    obs, key = jnp.array([0.1, -0.4, 1.0]), jr.key(3)
    for behaviour, distinct in ((Constant(1e-4), 1), (Constant(1e4), 4)):
        agent = replace(BASE, behaviour=behaviour)
        state = start(agent)
        u = latents(state, agent, obs, key, 4)
        # The same noise for every pick: only the second half of the key differs.
        pick = jax.vmap(lambda k, a=agent, s=state, u=u: a.explore(k, scores(s, u, obs) / a.behaviour(s.step)))
        picks = np.unique(pick(jr.split(jr.key(0), 200)))
        assert len(picks) == distinct
        action = jax.jit(agent.act, static_argnums=3)(state, obs, jr.clone(key), True)
        assert min(np.abs(np.asarray(jnp.tanh(u[i])) - action).max() for i in picks) < 1e-5


def scores(state, u, obs):
    return jax.vmap(lambda x: state.critic.value(obs, jnp.tanh(x)))(u)


@pytest.mark.parametrize("selector", [First(), First(3), Softmax(1), Argmax(1)])
def test_no_critic_call_without_a_choice(selector):
    agent = replace(BASE, explore=selector, greedy=selector)
    state, obs = start(agent), jnp.ones(3)
    without = eqx.tree_at(lambda s: s.critic, state, None)  # a call of the critic is an AttributeError
    for explore in (True, False):
        assert jax.eval_shape(lambda s: agent.act(s, obs, jr.key(1), explore), without).shape == (2,)  # noqa: B023


@pytest.mark.slow
def test_actor_step_leaves_the_critic_alone():
    states = []
    for rate in (1e-4, 1e-1):
        agent = replace(BASE, actor_lr=rate, backup=First())
        states.append(jax.jit(agent.update)(start(agent), batch(), jr.key(7))[0])
    jax.tree.map(np.testing.assert_array_equal, states[0].critic, states[1].critic)
    jax.tree.map(np.testing.assert_array_equal, states[0].target, states[1].target)
    assert not np.array_equal(states[0].actor.last.bias, states[1].actor.last.bias)


def test_temperature_reaches_the_network_when_asked():
    agent = replace(BASE, condition_on_temperature=True, explore=First())
    hot = replace(agent, temperature=Constant(5.0))
    state = start(agent)
    assert state.actor.first.weights[2].shape[0] == 3 + agent.embedding
    a, b = (x.act(state, jnp.ones(3), jr.key(1), True) for x in (agent, hot))
    assert np.abs(a - b).max() > 1e-4


@pytest.mark.parametrize("t_min", [0.0, 0.5, -0.1])
def test_t_min_is_refused(t_min):
    with pytest.raises(ValueError, match="t_min"):
        RFM(t_min=t_min)
