"""RFM: one update against an independently written one on the same keys, the official rule in NumPy, acting, backup."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from contraflow.agents.online.rfm import OFFICIAL, RFM, SMALL, Choice, PosteriorTarget
from contraflow.core.optim import Optim
from contraflow.core.types import Batch, EnvSpec
from contraflow.flow.fewstep import Matching, MeanFlow, Shortcut
from contraflow.flow.likelihood import Denoising, Pushforward, denoising_log_density
from contraflow.flow.matching import consistency_error, square
from contraflow.flow.model import Ddim
from contraflow.flow.path import VE, VP
from contraflow.flow.posterior.control import Fixed, MinVariance
from contraflow.flow.posterior.gibbs import Gibbs
from contraflow.flow.posterior.importance import Reverse
from contraflow.flow.posterior.proposal import Mixture, Noise, TruncatedNoise
from contraflow.flow.solver import Euler, EulerMaruyama, Midpoint
from contraflow.flow.support import Box, Tanh
from contraflow.nets.critic import QEnsemble
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.best_of import Argmax, First, Softmax
from contraflow.policy.flow import FlowPolicy
from contraflow.rl.critics import Critics
from contraflow.rl.energy import boltzmann
from contraflow.rl.temperature import Constant

SPEC = EnvSpec(3, 2, 4, 10, True)
B, LAM = 2, 0.5
CLIPPED = Optim(1e-2, max_grad_norm=0.5)
BASE = RFM(
    flow=replace(SMALL, solver=Euler(2), network=ResidualMLP(8, 1, 4)),
    target=PosteriorTarget(Reverse(8, Mixture(), Fixed(0.0)), query=Softmax(4), jacobian_power=0.7),
    choose=Choice(Softmax(4), Softmax(4), Argmax(4)),
    temperature=Constant(LAM), optim=CLIPPED, critic=Critics(width=8, depth=1, tau=0.1, optim=CLIPPED),
)  # fmt: skip


def batch(seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    discount = jnp.array([0.9, 0.0])  # the second row ended
    return Batch(normal(B, 3), jnp.tanh(normal(B, 2)), normal(B), discount, normal(B, 3), jnp.ones((B, 2)))


def start(agent, seed=0):
    """A first state whose target is not the critic, so that it matters which of the two is asked."""
    state = agent.init(jr.key(seed), SPEC)
    other = jax.jit(lambda k: QEnsemble(2, 3, 2, 8, 1, key=k))(jr.key(seed + 50))
    return eqx.tree_at(lambda s: s.target, state, other)


def expected(agent, state, data, key):
    """(y, actor loss, gradient, new critic) of one update on the linear path, written out sample by sample."""
    k_next, k_now, k_t, k_x0, k_posterior, _, k_density, _ = jr.split(jr.clone(key), 8)
    keys_next, keys_now, keys_mc, keys_density = (jr.split(k, B) for k in (k_next, k_now, k_posterior, k_density))
    flow, low = agent.flow, agent.flow.margin
    soft = isinstance(flow.support, Box)  # then also: the actor returns noise, and the backup is soft
    bounded = (lambda u: jnp.clip(u, -1, 1)) if soft else jnp.tanh

    def velocity(x, t, obs):
        out = state.actor.net(x, t, obs)
        return (jnp.clip((x - (1 - t) * out) / t, -1, 1) - x) / (1 - t) if soft else out

    def end(x, obs):
        dt = (1 - 2 * low) / flow.solver.steps
        for i in range(flow.solver.steps):
            x = x + dt * velocity(x, jnp.asarray(low + i * dt), obs)
        return x

    def particles(obs, key):
        k_x0, k_pick = jr.split(key)
        x0 = jr.normal(k_x0, (agent.choose.backup.particles, 2))
        u = jax.vmap(lambda x: end(x, obs))(x0)
        score = jax.vmap(lambda u: state.critic(obs, bounded(u)).min())(u) / LAM
        return x0, u, jr.categorical(k_pick, score)

    def log_prob(x0, u, obs, key):
        if isinstance(agent.density, Pushforward):
            (a, b), (c, d) = jax.jacfwd(end)(x0, obs)
            return jax.scipy.stats.norm.logpdf(x0).sum() - jnp.log(jnp.abs(a * d - b * c))
        x0_mean = lambda x, t: x - t * velocity(x, t, obs)
        return denoising_log_density(x0_mean, flow.path, u, low, 1 - low, 3, 2, key)

    y, x1 = [], []
    for b in range(B):
        x0, u, i = particles(data.next_obs[b], keys_next[b])
        bootstrap = 0.0 if b == 1 else state.target(data.next_obs[b], bounded(u[i])).min()
        if soft and b != 1:
            bootstrap -= LAM * log_prob(x0[i], u[i], data.next_obs[b], keys_density[b])
        y.append(data.reward[b] + (0.9, 0.0)[b] * bootstrap)
        _, u, i = particles(data.obs[b], keys_now[b])
        x1.append(
            u[i] if agent.target.endpoint == "policy" else data.action[b] if soft else jnp.arctanh(data.action[b])
        )
    y = jnp.stack(y)

    members = []
    for i in range(2):
        member = jax.tree.map(lambda leaf, i=i: leaf[i], state.critic.members)
        tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2))
        grad = jax.grad(lambda q: jnp.mean((jax.vmap(q)(data.obs, data.action)[:, 0] - y) ** 2))(member)
        members.append(eqx.apply_updates(member, tx.update(grad, tx.init(member))[0]))
    critic = lambda obs, a: jnp.minimum(*(q(obs, a)[0] for q in members))

    t = jr.uniform(k_t, (B,), minval=low, maxval=1 - low)
    x0 = jr.normal(k_x0, (B, 2))
    x_t = jnp.stack([t[b] * x1[b] + (1 - t[b]) * x0[b] for b in range(B)])
    targets = []
    for b in range(B):
        log_pi = boltzmann(lambda a, b=b: critic(data.obs[b], a), jnp.asarray(LAM), agent.target.jacobian_power)
        if soft:
            log_pi = lambda u, b=b: critic(data.obs[b], u) / LAM  # candidates lie in the box
        mean = agent.target.estimator(keys_mc[b], flow.path, log_pi, x_t[b], t[b]).mean
        targets.append((x_t[b] - t[b] * mean if soft else mean - x_t[b]) / (1 - t[b]))

    def loss(actor):
        v = jnp.stack([actor.net(x_t[b], t[b], data.obs[b]) for b in range(B)])
        return jnp.mean((v - jnp.stack(targets)) ** 2)

    return (y, *jax.value_and_grad(loss)(state.actor), members)


BUFFER = {"target": replace(BASE.target, endpoint="buffer")}
SOFT = {
    "flow": replace(BASE.flow, support=Box(), predict="noise", clip=1.0),
    "target": PosteriorTarget(Reverse(8, TruncatedNoise(), Fixed(0.0)), "buffer"),
    "density": Denoising(3, 2),
}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({}, id="policy"),
        pytest.param(BUFFER, id="buffer", marks=pytest.mark.slow),
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
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2))
    actor = eqx.apply_updates(state.actor, tx.update(grad, tx.init(state.actor))[0])

    def compare(a, b, g):
        clear = np.abs(g) > 1e-3 * float(norm)
        np.testing.assert_allclose(np.asarray(a)[clear], np.asarray(b)[clear], atol=1e-4)

    jax.tree.map(compare, new.actor, actor, grad)


def test_paper_estimator_is_the_official_rule():
    """Velocity targets on shared noise: the official NumPy-style rule with the gradient of a known Q by hand."""
    lam, slope = 0.3, np.array([1.0, -0.5])
    estimator = OFFICIAL.target.estimator
    assert (estimator.samples, estimator.proposal, estimator.control) == (100, Noise(), MinVariance())
    q = lambda a: a @ jnp.asarray(slope, jnp.float32) - jnp.sum(a**2)
    log_pi = boltzmann(q, jnp.asarray(lam), OFFICIAL.target.jacobian_power)
    run = jax.jit(lambda k, x_t, t: estimator(k, OFFICIAL.flow.path, log_pi, x_t, t).mean)
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
    p, flow, critic = OFFICIAL, OFFICIAL.flow, OFFICIAL.critic
    assert (flow.solver, flow.margin, p.target.jacobian_power, p.target.endpoint) == (Euler(10), 0.01, 1.0, "policy")
    assert p.target.query == Softmax(32) and p.choose == Choice(Softmax(32), Softmax(32), Argmax(32))
    assert (p.temperature, p.condition_on_temperature) == (Constant(0.02), True)
    assert (critic.gamma, critic.tau, critic.members) == (0.99, 0.005, 2)
    assert (flow.network, critic.width, critic.depth) == (ResidualMLP(256, 2, 128), 256, 2)
    assert (p.optim.lr, critic.optim.lr, p.optim.decay_steps, critic.optim.decay_steps) == (3e-4, 1e-3, None, None)
    assert p.optim.max_grad_norm == critic.optim.max_grad_norm == 10.0


OBS = jnp.array([0.1, -0.4, 1.0])


def latents(state, agent, obs, key, particles):
    """Euler by hand from the noise that acting draws."""
    flow = agent.flow
    x = flow.path.source_scale * jr.normal(jr.split(jr.clone(key))[0], (particles, 2))
    dt = (1 - 2 * flow.margin) / flow.solver.steps
    for i in range(flow.solver.steps):
        x = x + dt * jax.vmap(lambda y, i=i: state.actor.net(y, jnp.asarray(flow.margin + i * dt), obs))(x)
    return x


@pytest.mark.parametrize("path", [BASE.flow.path, VE()])
def test_greedy_takes_the_best_particle(path):
    agent, key = replace(BASE, flow=replace(BASE.flow, path=path)), jr.key(3)
    state = start(agent)
    u = latents(state, agent, OBS, key, 4)
    values = [state.critic(OBS, jnp.tanh(x)).min() for x in u]
    best = jnp.tanh(u[int(np.argmax(values))])
    # float32 sums in another order; the ends of VE, some 10, round in the sixth digit before tanh flattens them.
    np.testing.assert_allclose(jax.jit(lambda p: p(OBS, key))(agent.policy(state)), best, rtol=1e-4, atol=1e-5)
    worst = [state.critic(OBS, jnp.tanh(x)).max() for x in u]
    assert np.ptp(values) > 1e-3 and not np.allclose(values, worst)


def test_explore_picks_at_the_temperature():
    """Cold: the best of four; hot: any of them."""
    key = jr.key(3)
    for lam, distinct in ((1e-4, 1), (1e4, 4)):
        agent = replace(BASE, temperature=Constant(lam))
        state = start(agent)
        u = latents(state, agent, OBS, key, 4)
        policy = agent.policy(state)
        # The same noise for every pick: only the second half of the key differs.
        pick = jax.vmap(lambda k, s=state, u=u: agent.choose.explore(k, scores(s, u, OBS) / s.temperature))  # noqa: B023
        picks = np.unique(pick(jr.split(jr.key(0), 200)))
        assert len(picks) == distinct
        action = jax.jit(lambda p, k: p(OBS, k, False))(policy, jr.clone(key))
        assert min(np.abs(np.asarray(jnp.tanh(u[i])) - action).max() for i in picks) < 1e-5


def scores(state, u, obs):
    return jax.vmap(lambda x: state.critic.value(obs, jnp.tanh(x)))(u)


@pytest.mark.parametrize("selector", [First(), First(3), Softmax(1), Argmax(1)])
def test_no_critic_call_without_a_choice(selector):
    agent = replace(BASE, choose=Choice(selector, Softmax(4), selector))
    policy = agent.policy(start(agent))
    without = eqx.tree_at(lambda p: p.critic, policy, None)  # a call of the critic is an AttributeError
    for greedy in (True, False):
        assert jax.eval_shape(lambda p: p(OBS, jr.key(1), greedy), without).shape == (2,)  # noqa: B023


@pytest.mark.slow
def test_actor_step_leaves_the_critic_alone():
    states = []
    for rate in (1e-4, 1e-1):
        agent = replace(BASE, optim=Optim(rate), choose=replace(BASE.choose, backup=First()))
        states.append(jax.jit(agent.update)(start(agent), batch(), jr.key(7))[0])
    jax.tree.map(np.testing.assert_array_equal, states[0].critic, states[1].critic)
    jax.tree.map(np.testing.assert_array_equal, states[0].target, states[1].target)
    assert not np.array_equal(states[0].actor.net.last.bias, states[1].actor.net.last.bias)


def test_temperature_reaches_the_network_when_asked():
    agent = replace(BASE, condition_on_temperature=True, choose=replace(BASE.choose, explore=First()))
    state = start(agent)
    assert state.actor.net.first.weights[2].shape[0] == 3 + agent.flow.network.embedding
    hot = replace(state, temperature=jnp.asarray(5.0))
    act = jax.jit(lambda policy: policy(jnp.ones(3), jr.key(1), False))
    a, b = (act(agent.policy(s)) for s in (state, hot))
    assert np.abs(a - b).max() > 1e-4
    assert agent.policy(state).policy.temperature is state.temperature


@pytest.mark.parametrize("margin", [0.0, 0.5, -0.1])
def test_a_margin_is_asked_for(margin):
    with pytest.raises(ValueError, match="margin"):
        RFM(flow=replace(SMALL, margin=margin))


# An average velocity: longer steps are tied to shorter ones.

AVERAGE = replace(
    BASE, objective=Shortcut(levels=3), flow=replace(SMALL, solver=Ddim(1), network=ResidualMLP(8, 1, 8)),
    choose=replace(BASE.choose, backup=First()), target=PosteriorTarget(Reverse(4, Noise(), Fixed(0.0))), tau=0.25,
)  # fmt: skip


def test_update_adds_matching_and_ties_and_moves_the_copy():
    """loss = share match + (1 - share) tie, for which the copy is asked, not the actor; the copy follows the actor."""
    state, data = start(AVERAGE), batch()
    state = eqx.tree_at(lambda s: s.slow, state, jax.tree.map(lambda w: w + 0.1, state.slow))
    losses = {}
    for share in (0.2, 0.5, 0.8):
        new, metrics = jax.jit(replace(AVERAGE, objective=Shortcut(share, 3)).update)(state, data, jr.key(6))
        losses[share] = float(metrics["actor_loss"])
        for slow, old, actor in zip(*(jax.tree.leaves(x) for x in (new.slow, state.slow, new.actor)), strict=True):
            np.testing.assert_allclose(slow, old + 0.25 * (actor - old), rtol=1e-5, atol=1e-7)
    keys = jr.split(jr.key(6), 8)  # as `update` splits it: the second for endpoints, the last for ties
    x1 = jax.jit(AVERAGE.endpoints)(state, data.obs, keys[1])[:, 0]

    def tie(cond, x1, key):
        k_interval, k_x0, k_target = jr.split(key, 3)
        x0 = jr.normal(k_x0, (2,))
        flows = state.actor, state.slow
        return square(consistency_error(AVERAGE.objective, *flows, cond, x0, x1, k_interval, k_target))

    tied = jax.jit(jax.vmap(tie))(data.obs, x1, jr.split(keys[7], B)).mean()
    slope = (losses[0.8] - losses[0.2]) / 0.6
    np.testing.assert_allclose(losses[0.2] - 0.2 * slope, tied, rtol=1e-3)
    np.testing.assert_allclose(losses[0.5], (losses[0.2] + losses[0.8]) / 2, rtol=1e-4)
    assert abs(losses[0.8] - losses[0.2]) > 1e-3


def test_a_network_that_knows_times_only_is_no_average():
    """The flow is made an averaged one by its objective, and plain matching refuses one."""
    assert AVERAGE.flow.averaged and not SMALL.averaged
    with pytest.raises(ValueError, match="objective that makes steps consistent"):
        replace(AVERAGE, objective=Matching())


@pytest.mark.parametrize(
    "change",
    [
        {"flow": replace(SMALL, solver=Midpoint(2))},
        {"flow": replace(SMALL, path=VP(), solver=Ddim(1))},
        {"flow": replace(SMALL, predict="noise", solver=Ddim(1))},
    ],
)
def test_what_has_no_average_is_refused(change):
    with pytest.raises(ValueError, match="average"):
        RFM(objective=MeanFlow(), **change)


def test_a_density_needs_a_solver_without_noise():
    with pytest.raises(ValueError, match="without noise"):
        replace(BASE, flow=replace(BASE.flow, solver=EulerMaruyama(5)), density=Pushforward())


def test_one_particle_is_the_flow():
    """`BestOf` with no choice acts as its flow does."""
    agent = replace(BASE, choose=Choice(First(), Softmax(4), First()))
    state = start(agent)
    one = jax.jit(lambda p: p(OBS, jr.key(2)))(agent.policy(state))
    flow = FlowPolicy(state.actor).particles(OBS, jr.split(jr.key(2))[0], 1)[0]
    np.testing.assert_allclose(one, flow, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [{"endpoint": "buffer"}, {"query": Softmax(32)}, {"query": Argmax(4)}])
def test_chains_start_at_the_policys_own_endpoint(bad):
    """From another start the steps of `Gibbs` would no longer leave the posterior invariant."""
    with pytest.raises(ValueError, match="First"):
        PosteriorTarget(Gibbs(), **bad)
    assert PosteriorTarget(Gibbs(), query=First(4)).query.particles == 4


@pytest.mark.parametrize(("estimator", "support"), [(Gibbs(), Box()), (Gibbs(bound=1.0), Tanh())])
def test_an_estimator_suits_the_support(estimator, support):
    with pytest.raises(ValueError, match="does not suit"):
        RFM(flow=replace(SMALL, support=support), target=PosteriorTarget(estimator))
