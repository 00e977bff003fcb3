"""`ModeJump`: it leaves exp(Q / lambda) as it is, and reaches modes that the policy lacks, in shares that are right."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.agents.online.rfm import RFM, SMALL, PosteriorTarget
from contraflow.flow.posterior.importance import Reverse
from contraflow.flow.posterior.jump import ModeJump
from contraflow.flow.support import Box, Real, Tanh
from contraflow.flow.targets import GaussianMixture


def two_modes(d, far=0.6):
    """Apart on the diagonal by 12 of their deviations in each coordinate; one has twice the probability."""
    return GaussianMixture(jnp.stack([jnp.full(d, far), jnp.full(d, -far)]), 0.1, jnp.array([2.0, 1.0]))


@eqx.filter_jit
def moved(jump, target, starts, key, support=Tanh()):
    return jax.vmap(lambda k, u: jump(k, target, u, support))(jr.split(key, len(starts)), starts)


def second(u):
    return np.asarray(u.mean(1) < 0)


@pytest.mark.parametrize("d", [1, 6])
def test_it_leaves_the_target_as_it_is(d):
    """Of draws of it: the shares of modes, means and squares, in standard errors. Most have moved."""
    target = two_modes(d)
    start = target.sample(jr.key(0), 20_000)
    end, went = moved(ModeJump(), target, start, jr.key(1))
    crossed = second(start) != second(end)
    assert went.mean() > 0.3 and crossed.mean() > 0.1
    for feature in (second, lambda u: np.asarray(u[:, 0]), lambda u: np.asarray(u[:, 0] ** 2)):
        change = feature(end) * 1.0 - feature(start)
        assert abs(change.mean()) < 4 * change.std() / np.sqrt(len(change))


def test_it_leaves_a_target_in_a_box_as_it_is():
    """exp(3 a) on [-1, 1]^2 rises up to a corner, where climbs end; nothing leaves the box."""
    place = jr.uniform(jr.key(0), (20_000, 2))
    start = jnp.log(jnp.exp(-3.0) + place * (jnp.exp(3.0) - jnp.exp(-3.0))) / 3.0
    end, went = moved(ModeJump(), lambda u: 3.0 * jnp.sum(u), start, jr.key(1), Box())
    assert went.mean() > 0.3 and jnp.abs(end).max() <= 1.0
    for power in (1, 2):
        change = np.asarray(end**power - start**power).mean(1)
        assert abs(change.mean()) < 4 * change.std() / np.sqrt(len(change))


@pytest.mark.parametrize("d", [3, 12])
def test_a_mode_that_is_lacking_is_found_in_its_share(d):
    """From the other mode alone: at once by some, and in the right share after many steps."""
    target = two_modes(d)
    u = target.means[:1] + 0.1 * jr.normal(jr.key(0), (2000, d))
    once, _ = moved(ModeJump(), target, u, jr.key(1))
    assert second(once).mean() > 0.1
    many = jax.jit(lambda u, keys: jax.lax.scan(lambda u, k: (moved(ModeJump(), target, u, k)[0], None), u, keys)[0])
    # A standard error is .011.
    assert abs(second(many(u, jr.split(jr.key(2), 40))).mean() - 1 / 3) < 0.04


def test_starts_far_away_and_flat_values_are_survived():
    """Where the critic says the same of all actions there is no gradient to climb; u = 40 is an action of 1."""
    flat = lambda u: 0.0 * jnp.sum(u)
    far = jnp.full((200, 2), 40.0)
    for target, start in ((two_modes(2), far), (flat, far), (flat, 0.0 * far)):
        end, went = moved(ModeJump(), target, start, jr.key(0))
        assert jnp.isfinite(end).all() and (went.any() or start is far)
    outside, _ = moved(ModeJump(samples=1), flat, far, jr.key(0), Box())
    assert jnp.abs(outside).max() <= 1.0


def test_what_cannot_be_is_refused():
    for bad in ({"share": 0.0}, {"share": 1.1}, {"centres": 0}, {"climbs": 0}, {"samples": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ModeJump(**bad)
    with pytest.raises(ValueError, match="jump"):
        PosteriorTarget(Reverse(), "buffer", jump=ModeJump())
    with pytest.raises(ValueError, match="uniform actions"):
        RFM(flow=replace(SMALL, support=Real()), target=PosteriorTarget(jump=ModeJump()))
