"""RQL against its closed forms: actions taken back along a known flow, the value of what is half made, the shift."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.agents.agent_helpers import Frozen, with_slope
from tests.compiled import optimised

from contraflow.agents.offline.dql import DIFFUSION
from contraflow.agents.offline.rql import RQL
from contraflow.core.optim import Optim, gradient_step
from contraflow.core.types import Batch, EnvSpec
from contraflow.flow.model import Ddim, FlowSpec
from contraflow.nets.critic import Mean
from contraflow.nets.heads import Expectile, Point
from contraflow.nets.velocity import ResidualMLP
from contraflow.rl.critics import Critics

D, K = 2, 4
SPEC = EnvSpec(1, D, 1, None, False)
SMALL = RQL(
    flow=FlowSpec(solver=Ddim(K), network=ResidualMLP(8, 1, 4)),
    critic=Critics(2, Expectile(0.7), reduce=Mean(), backup=Mean(0.5), width=8, depth=1, tau=0.1, optim=Optim(1e-3)),
    optim=Optim(1e-2),
)
FROZEN = replace(SMALL, critic=Frozen(**vars(SMALL.critic)))
SLOPES = np.array([[0.5, -1.0, 0.0], [1.0, 1.5, 0.0]])  # of x; V does not depend on f
SLOPES_OF_F = np.array([[0, 0, 5.0], [0, 0, -3.0]])
MEAN, STD = 0.2, 0.4


class Looking(Critics):
    """Critics that do not learn, and tell what they are to learn."""

    def learn(self, critic, target, opt, batch, action, key, bonus=0.0, over="mean"):
        _, y = self.td_targets(target, batch, action, key)
        return critic, target, opt, {"place": batch.action, "next": action, "y": y}


class Gaussian(eqx.Module):
    """The velocity of data N(mean, std^2), and `more` to all of it."""

    more: jax.Array

    @property
    def dim(self):
        return self.more.shape[0]

    def __call__(self, x, t, cond):
        t = t / 5.0  # the clock of the flow
        var = t**2 * STD**2 + (1 - t) ** 2
        x1, x0 = MEAN + t * STD**2 * (x - t * MEAN) / var, (1 - t) * (x - t * MEAN) / var
        return x1 - x0 + self.more


def batch(key, n=16, mask=None):
    k_action, k_reward, k_obs = jr.split(key, 3)
    action = MEAN + STD * jr.normal(k_action, (n, D))  # not cut off: the data of the closed forms
    mask = jnp.ones((n, D)) if mask is None else mask
    obs = jr.normal(k_obs, (n, 1))
    return Batch(obs, action, jr.normal(k_reward, (n,)), jnp.full(n, 0.9), -obs, mask)


def fresh(agent):
    return jax.jit(lambda k: agent.init(k, SPEC))(jr.key(0))


def known(agent):
    """A state with the flow of the data."""
    state = fresh(agent)
    flow = eqx.tree_at(lambda f: f.net, state.flow, Gaussian(jnp.zeros(D)))
    return replace(state, flow=flow, average=jax.tree.map(jnp.copy, flow), flow_opt=agent.optim.init(flow))


def test_actions_are_taken_back_along_the_flow():
    """x_f lies as many deviations from its mean as the action does, exactly at f = 1; half of the times are those of
    the solver. Whoever goes on from x_f arrives at the action."""
    steps, n = 100, 256
    agent = replace(SMALL, flow=replace(SMALL.flow, solver=Ddim(steps)), critic=Looking(**vars(SMALL.critic)))
    rows = batch(jr.key(1), n)
    metrics = jax.jit(agent.update)(known(agent), rows, jr.key(2))[1]
    x, f = np.asarray(metrics["place"][:, :D]), np.asarray(metrics["place"][:, D:])
    scale = np.sqrt(f**2 * STD**2 + (1 - f) ** 2)
    want = f * MEAN + scale * (np.asarray(rows.action) - MEAN) / STD
    # Euler's error over the whole way is of first order: with 100 steps a few hundredths of x_0.
    np.testing.assert_allclose(x, want, rtol=0.03, atol=0.03)
    whole = f[:, 0] == 1.0
    assert whole.any() == (x == np.asarray(rows.action)).all(1).any()
    np.testing.assert_array_equal(x[whole], np.asarray(rows.action)[whole])
    on_grid = np.isclose(f[:, 0] * steps, np.round(f[:, 0] * steps), atol=1e-3)
    assert on_grid[n // 2 :].all() and on_grid[: n // 2].mean() < 0.1
    assert f.min() < 0.05 and f.max() > 0.95 and abs(f.mean() - 0.5) < 4 * 0.29 / n**0.5  # four standard errors


def test_targets_are_the_value_of_the_successor_and_fresh_noise():
    """y = r + discount (mean_j V_j - rho std_j V_j)(s', z, 0)."""
    agent = replace(SMALL, critic=Looking(**vars(SMALL.critic)))
    state, rows = with_slope(fresh(agent), SLOPES + SLOPES_OF_F), batch(jr.key(1), 512)
    metrics = jax.jit(agent.update)(state, rows, jr.key(2))[1]
    z, f = np.asarray(metrics["next"][:, :D]), np.asarray(metrics["next"][:, D])
    assert (f == 0).all() and len(np.unique(z)) == z.size
    np.testing.assert_allclose([z.mean(), z.std()], [0.0, 1.0], atol=4 / 1024**0.5)  # four standard errors
    v = z @ SLOPES[:, :D].T
    want = np.asarray(rows.reward) + 0.9 * (v.mean(1) - 0.5 * v.std(1))
    np.testing.assert_allclose(metrics["y"], want, atol=1e-3)  # of values lifted by 60


def test_the_value_of_what_is_half_made_is_that_of_its_end():
    """A bandit with the reward -(a - c)^2, data N(m, c^2) and their exact flow: V(x, f) is the reward of the action to
    which the flow takes x from f; at f = 1 that is Q(a). Trained."""
    goal, steps = 0.5, 20
    agent = RQL(
        flow=replace(SMALL.flow, solver=Ddim(steps)), optim=Optim(1e-3),
        critic=Critics(1, Point(), reduce=Mean(), backup=Mean(), width=64, optim=Optim(3e-3, decay_steps=2000)),
    )  # fmt: skip
    state = known(agent)

    @optimised
    def run(state):
        def one(state, key):
            rows = batch(key, 256)
            reward = -jnp.sum((rows.action - goal) ** 2, -1)
            rows = replace(rows, reward=reward, discount=jnp.zeros(256), obs=jnp.zeros((256, 1)))
            new = agent.update(state, rows, jr.fold_in(key, 1))[0]
            return replace(new, flow=state.flow, flow_opt=state.flow_opt, average=state.average), None

        return jax.lax.scan(one, state, jr.split(jr.key(1), 2000))[0]

    critic = run(state).critic
    for f in (0.0, 0.5, 1.0):
        scale = np.sqrt(f**2 * STD**2 + (1 - f) ** 2)
        units = np.random.default_rng(0).standard_normal((200, D)).clip(-2, 2)
        x = jnp.asarray(np.concatenate([f * MEAN + scale * units, np.full((200, 1), f)], 1), jnp.float32)
        got = jax.vmap(lambda a: critic.value(jnp.zeros(1), a))(x)
        want = -np.sum((MEAN + STD * units - goal) ** 2, 1)
        # A network of 64 after 2000 steps, and 20 steps of Euler: a fifth of the deviation of rewards.
        assert np.sqrt(np.mean((got - want) ** 2)) < 0.2 * want.std(), f


@pytest.mark.parametrize("alpha", [0.1, 1.0, 100.0])
def test_the_flow_is_shifted_by_the_slope_of_the_value(alpha):
    """v* = E[x1 - x0 | x_t] + d h g / (2 alpha): trained, a constant beside the exact velocity, for which h has the
    mean 1/K - 1/(2 K^2). With a large alpha nothing is left but cloning."""
    agent = replace(FROZEN, alpha=alpha, normalise_q=False, optim=Optim(0.05, decay_steps=2000))
    state = with_slope(known(agent), SLOPES)

    @optimised
    def run(state):
        def one(state, key):
            return agent.update(state, batch(key, 512), jr.fold_in(key, 1))[0], None

        return jax.lax.scan(one, state, jr.split(jr.key(1), 2000))[0]

    more = run(state).flow.net.more
    want = D * (1 / K - 0.5 / K**2) * SLOPES[:, :D].mean(0) / (2 * alpha)
    # Noise of Adam at a last rate of .005 under errors of deviation about one: a few hundredths.
    np.testing.assert_allclose(more, want, atol=0.05)
    assert np.abs(want).max() > 0.15 or alpha == 100.0
    if alpha == 100.0:
        assert np.abs(want).max() < 0.002


def test_the_flow_by_hand():
    """alpha |v - (x1 - x0)|^2 - V(x_t + h v, t + h) and its gradient, in which V is asked where the step ends."""
    slopes = SLOPES + SLOPES_OF_F
    agent = replace(FROZEN, alpha=0.7, normalise_q=True)
    state, rows = with_slope(fresh(agent), slopes), batch(jr.key(1))
    metrics = jax.jit(agent.update)(state, rows, jr.key(2))[1]

    def loss(flow):
        def one(obs, action, key):
            k_noise, k_t = jr.split(key)
            x0, t = jr.normal(k_noise, (D,)), jr.uniform(k_t)
            x = t * action + (1 - t) * x0
            v = flow.net(x, 5.0 * t, obs)
            h = jnp.where(t < 1 - 1 / K, 1 / K, 1 - t)
            g = jnp.asarray(slopes.mean(0), jnp.float32)
            return jnp.mean((v - action + x0) ** 2), (x + h * v) @ g[:D] + (t + h) * g[D]

        keys = jr.split(jr.split(jr.key(2), 4)[3], 16)
        error, value = jax.vmap(one)(rows.obs, rows.action, keys)
        return 0.7 * error.mean() - value.mean() / jax.lax.stop_gradient(jnp.abs(value).mean())

    want = jax.jit(lambda flow, opt: gradient_step(agent.optim.tx, loss, flow, opt))(state.flow, state.flow_opt)
    np.testing.assert_allclose(metrics["actor_loss"], want[2], rtol=1e-4, atol=1e-4)  # values lifted by 75
    np.testing.assert_allclose(metrics["actor_grad_norm"], want[3], rtol=1e-3)


@pytest.mark.parametrize("scale", [1024.0, 3.0])
def test_normalised_values_move_the_flow_the_same(scale):
    state = fresh(FROZEN)
    for normalise in (True, False):
        update = jax.jit(replace(FROZEN, normalise_q=normalise).update)
        one, large = (
            update(with_slope(state, s * SLOPES), batch(jr.key(1)), jr.key(2))[1]["actor_grad_norm"]
            for s in (1.0, scale)
        )
        assert np.isclose(one, large, rtol=1e-4) == normalise


def test_the_expectile_of_two_returns():
    """Of +1 and -1, equally likely, it is 2 level - 1; the loss of level .5 is the square error."""
    for level in (0.5, 0.7, 0.9):
        head = Expectile(level)
        loss = lambda q, head=head: sum(head.loss(jnp.array([q]), jnp.array([y])) for y in (1.0, -1.0))
        np.testing.assert_allclose(jax.grad(loss)(2 * level - 1), 0.0, atol=1e-6)
        assert jax.grad(loss)(2 * level - 0.9) > 0.05
    out, y = jnp.array([0.3]), jnp.array([1.2])
    np.testing.assert_allclose(Expectile(0.5).loss(out, y), Point().loss(out, y), rtol=1e-6)


def test_masked_actions_are_not_cloned():
    state = with_slope(fresh(FROZEN), 0 * SLOPES)
    new, _ = jax.jit(FROZEN.update)(state, batch(jr.key(1), mask=jnp.ones((16, D)).at[:, 1].set(0.0)), jr.key(2))
    moved = new.flow.net.last.bias - state.flow.net.last.bias
    assert moved[1] == 0 and jnp.abs(moved[0]) > 1e-3


def test_settings_that_make_no_sense_are_refused():
    for wrong, said in (({"flow": DIFFUSION}, "velocity"), ({"alpha": 0.0}, "alpha"), ({"ema": 1.0}, "ema")):
        with pytest.raises(ValueError, match=said):
            replace(SMALL, **wrong)
    with pytest.raises(ValueError, match="level"):
        Expectile(1.0)
