"""The flow of RFM as an average velocity: a network that is the flow of a known Gaussian, and one that is wrong."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.agents.online.rfm import RFM
from contraflow.core.types import EnvSpec, Transition
from contraflow.flow.fewstep import Matching, MeanFlow, Shortcut, SplitMeanFlow
from contraflow.flow.likelihood import Pushforward
from contraflow.flow.path import VP
from contraflow.flow.posterior.control import Fixed
from contraflow.flow.posterior.importance import Reverse
from contraflow.flow.posterior.proposal import Noise
from contraflow.flow.solver import Euler, EulerMaruyama, Midpoint
from contraflow.nets.velocity import Velocity
from contraflow.policy.select import First
from contraflow.rl.critics import Critics
from contraflow.rl.flow_policy import CLOCK
from contraflow.rl.temperature import Constant

MEAN, STD = 1.3, 0.4
SPEC = EnvSpec(3, 2, 4, 10, True)
AGENT = RFM(
    objective=Shortcut(levels=3), solver=Euler(1), width=8, depth=1, embedding=8,
    estimator=Reverse(4, Noise(), Fixed(0.0)), backup=First(), temperature=Constant(0.02),
    critic=Critics(width=8, depth=1),
)  # fmt: skip
OBJECTIVES = [Shortcut(levels=3), SplitMeanFlow(), MeanFlow()]
COND = jnp.zeros(3)


class Exact(Velocity):
    """The flow of N(MEAN, STD^2), which reads the length of its step off the features it is given."""

    def __call__(self, x, t, cond):
        # The first features are sine and cosine of the length itself.
        n = self.embedding
        length = jnp.mod(jnp.arctan2(cond[3], cond[3 + n // 2]), 2 * jnp.pi) / CLOCK
        length = jnp.where(length > 1.1, 0.0, length)  # a zero that was rounded to below zero
        r = t + length
        scale = lambda t: jnp.sqrt(t**2 * STD**2 + (1 - t) ** 2)
        velocity = MEAN + (t * STD**2 - (1 - t)) / scale(t) ** 2 * (x - t * MEAN)
        step = (r * MEAN + scale(r) / scale(t) * (x - t * MEAN) - x) / jnp.where(length < 1e-4, 1.0, length)
        return jnp.where(length < 1e-4, velocity, step)


def exact():
    return Exact(2, 3 + AGENT.embedding, 8, 1, embedding=AGENT.embedding, key=jr.key(0))


@pytest.mark.parametrize("steps", [1, 4])
def test_any_number_of_steps_gives_the_law(steps):
    flow = replace(AGENT, solver=Euler(steps)).flow
    _, u = jax.jit(lambda k: flow.draw(exact(), COND, k, 4000))(jr.key(1))
    np.testing.assert_allclose(u, MEAN + STD * jr.normal(jr.key(1), (4000, 2)), atol=2e-3)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_density_of_the_sampler(steps):
    """That of a known Gaussian; of a network that is wrong by differences of its ends."""
    flow, key = replace(AGENT, solver=Euler(steps)).flow, jr.key(7)
    log_prob = jax.jit(jax.vmap(lambda net, x0, u: flow.log_prob(Pushforward(), net, COND, x0, u, key), (None, 0, 0)))
    x0, u = flow.draw(exact(), COND, jr.key(1), 50)
    known = jax.scipy.stats.norm.logpdf(u, MEAN, STD).sum(1) - jnp.log(1 - jnp.tanh(u) ** 2).sum(1)
    np.testing.assert_allclose(log_prob(exact(), x0, u), known, atol=0.01)

    wrong = AGENT.flow.init(jr.key(5), 2, 3)
    wrong = eqx.tree_at(lambda net: net.last.weight, wrong, 0.3 * jr.normal(jr.key(6), wrong.last.weight.shape))
    x0, u = flow.draw(wrong, COND, jr.key(1), 50)
    h = 1e-2
    end = jax.jit(jax.vmap(lambda x: flow.action(flow.end(wrong, COND, x))))
    across = [(end(x0 + h * e[None]) - end(x0 - h * e[None])) / (2 * h) for e in jnp.eye(2)]
    slope = across[0][:, 0] * across[1][:, 1] - across[0][:, 1] * across[1][:, 0]
    by_hand = jax.scipy.stats.norm.logpdf(x0).sum(1) - jnp.log(jnp.abs(slope))
    np.testing.assert_allclose(log_prob(wrong, x0, u), by_hand, atol=0.05)
    assert np.std(np.log(np.abs(slope))) > 0.1


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_exact_flow_has_nothing_to_tie(objective):
    """But for Euler's error of the smallest steps of a shortcut. A network that is wrong has something."""
    flow = replace(AGENT, objective=objective).flow
    net, wrong = exact(), AGENT.flow.init(jr.key(5), 2, 3)
    u = jax.vmap(lambda k: MEAN + STD * jr.normal(k, (2,)))(jr.split(jr.key(2), 200))

    def tied(net, slow):
        one = lambda x, k: flow.tie(net, slow, COND, x, k)
        return jax.vmap(one)(u, jr.split(jr.key(3), 200)).mean()

    error, bad = jax.jit(lambda: (tied(net, net), tied(wrong, wrong)))()
    # MeanFlow's target is only defined for r > t, and the fake's derivative is that of a step only there.
    assert error < (0.02 if isinstance(objective, Shortcut) else 1e-3)
    assert bad > 10 * error


def test_matching_is_of_the_velocity_at_t():
    """The regression on a posterior mean sees u(x, t, t), whatever the steps in use."""
    flow, x_t, t = AGENT.flow, jnp.array([0.3, -0.2]), jnp.asarray(0.4)
    mean = MEAN + t * STD**2 / (t**2 * STD**2 + (1 - t) ** 2) * (x_t - t * MEAN)
    assert flow.match(exact(), COND, mean, x_t, t) < 1e-8
    assert flow.match(exact(), COND, mean + 0.1, x_t, t) > 1e-2


def test_update_adds_both_and_moves_the_copy():
    """loss = share match + (1 - share) tie; the copy follows the actor."""
    agent = replace(AGENT, follow=0.25, actor_lr=1e-2)
    state = jax.jit(lambda k: agent.init(k, SPEC))(jr.key(0))
    row = lambda k, n: jr.normal(jr.key(k), (5, n))
    ended = jnp.ones(5, bool)
    batch = Transition(row(1, 3), jnp.tanh(row(2, 2)), row(3, 1)[:, 0], row(4, 3), ended, ~ended, jnp.ones(5, int))
    losses = {}
    for share in (0.2, 0.5, 0.8):
        update = jax.jit(replace(agent, objective=Shortcut(share, 3)).update)
        new, metrics = update(state, batch, jr.key(6))
        losses[share] = float(metrics["actor_loss"])
        jax.tree.map(
            lambda slow, old, actor: np.testing.assert_allclose(slow, old + 0.25 * (actor - old), atol=1e-6),
            new.slow, state.slow, new.actor,
        )  # fmt: skip
    keys = jr.split(jr.key(6), 8)  # as `update` splits it: the second for endpoints, the last for ties
    x1 = jax.jit(agent.endpoints)(state, batch.obs, keys[1])[:, 0]
    tie = jax.jit(jax.vmap(agent.flow.tie, (None, None, 0, 0, 0)))
    tied = tie(state.actor, state.slow, batch.obs, x1, jr.split(keys[7], 5)).mean()
    slope = (losses[0.8] - losses[0.2]) / 0.6
    np.testing.assert_allclose(losses[0.2] - 0.2 * slope, tied, rtol=1e-3)
    np.testing.assert_allclose(losses[0.5], (losses[0.2] + losses[0.8]) / 2, rtol=1e-4)
    assert abs(losses[0.8] - losses[0.2]) > 1e-3


def test_what_does_not_fit_is_refused():
    for fields in (
        {"solver": Midpoint(2)},
        {"path": VP()},
        {"predict": "noise"},
        {"objective": MeanFlow(power=1.0)},
        {"objective": Matching(), "solver": EulerMaruyama(5, path=VP())},
        {"objective": Matching(), "solver": EulerMaruyama(5), "density": Pushforward()},
    ):
        with pytest.raises(ValueError, match=r"average|power|path|noise"):
            replace(AGENT, **fields)
