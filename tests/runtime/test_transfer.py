"""Adaptation to changed sensors and dynamics, against relative entropies and maps in closed form."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.core.types import EnvSpec, UserError
from contraflow.policy.artifact import load_policy, save_policy
from contraflow.policy.uniform import uniform_policy
from contraflow.runtime.action_flow import inverse_model, transformed
from contraflow.runtime.adapt import adapted, mixture_kl

estimate = jax.jit(jax.vmap(mixture_kl, (0, 0, None, 0, None)), static_argnums=4)


def estimates(d, shift, leave_one_out, n=64, std=1.0, repeats=40):
    """Mean of the estimate, and its standard error, for encodings ~ N(shift, I) and ~ N(0, I) in d dimensions."""
    keys = jr.split(jr.key(d), 3)
    p, q = (jr.normal(k, (repeats, n, d)) for k in keys[:2])
    found = estimate(p.at[..., 0].add(shift), q, std, jr.split(keys[2], repeats), leave_one_out)
    return float(found.mean()), float(found.std() / np.sqrt(repeats))


@pytest.mark.parametrize(("d", "released"), [(2, 0.04), (8, 0.69), (64, 36.6)])
def test_equal_domains_are_zero_apart_only_without_the_own_component(d, released):
    """64 encodings with deviation 1: the released estimate is off by up to 37 nats, the other within its error."""
    biased, _ = estimates(d, 0.0, False)
    fair, error = estimates(d, 0.0, True)
    assert np.isclose(biased, released, rtol=0.15, atol=0.01)
    assert abs(fair) < 4 * error < 1.0


def test_shifted_domains_are_apart_by_the_relative_entropy_of_gaussians():
    """Encodings ~ N(m, I) with noise of deviation 1 are N(m, 2 I) together: KL = |m|^2 / 4. In 2 dimensions with many
    encodings both estimates agree. In 64 the mixture of 64 is too coarse: the shift counts 3.8 for 2.25, still below
    the |m|^2 / 2 of separate components, and the released estimate says 40."""
    for leave_one_out in (True, False):
        found, error = estimates(2, 1.5, leave_one_out, 512, repeats=8)
        assert abs(found - 1.5**2 / 4) < 4 * error + 0.02
    fair, error = estimates(64, 3.0, True)
    assert 9 / 4 < fair < 9 / 2 and abs(fair - 3.8) < 4 * error
    assert estimates(64, 3.0, False)[0] > 37


def skewed(key, n=2000):
    """Source observations whose distribution no rotation or mirror image keeps."""
    x = jr.exponential(key, (n, 2)) * jnp.array([1.0, 0.4])[None]
    return x + 0.3 * jnp.stack([jnp.zeros(n), x[:, 0] ** 2], 1)


def see(obs, key, greedy=True):
    """A policy whose action is its observation."""
    return obs


def test_an_affine_change_of_sensors_is_found():
    """Gains, an offset and a rotation of 20 degrees are taken back, from other draws of the same distribution."""
    turn, angle = jnp.array([0.3, -0.2]), np.radians(20)
    mix = jnp.asarray([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], jnp.float32) * 1.2
    source, other = skewed(jr.key(0)), skewed(jr.key(1))
    target = other @ mix.T + turn[None]
    policy = adapted(see, source, target, jr.key(2), steps=400, batch=128)
    before = jnp.mean(jnp.linalg.norm(target - other, axis=1))
    after = jnp.mean(jnp.linalg.norm(jax.vmap(policy.encode)(target) - other, axis=1))
    assert after < 0.15 * before


def test_equal_sensors_are_left_alone():
    """With the leave-one-out estimate; the released one widens the encodings or pulls them together."""
    source, target = skewed(jr.key(0)), skewed(jr.key(1))
    policy = adapted(see, source, target, jr.key(2), steps=200, batch=128)
    moved = jnp.abs(jax.vmap(policy.encode)(target) - target).mean() / target.std()
    assert moved < 0.1


NOMINAL = jnp.array([[0.5, 0.1], [0.0, 0.4]])


def linear_robot(key, gain, n=1000):
    """Transitions of s' = s + B K a under uniform actions."""
    k_obs, k_action = jr.split(key)
    obs, action = jr.normal(k_obs, (n, 2)), jr.uniform(k_action, (n, 2), minval=-1.0)
    return obs, action, obs + action @ (NOMINAL @ gain).T


def exact(obs, next_obs):
    """The nominal action that leads from s to s'."""
    return jnp.linalg.solve(NOMINAL, next_obs - obs)


TURNED = 0.8 * jnp.array([[np.cos(0.9), -np.sin(0.9)], [np.sin(0.9), np.cos(0.9)]], jnp.float32)


@pytest.mark.parametrize(
    ("given_plan", "gain"),
    [(True, jnp.eye(2)), (True, TURNED), (False, TURNED)],
    ids=["unchanged", "turned", "turned without the plan"],
)
def test_the_flow_of_a_linear_change_is_its_inverse(given_plan, gain):
    """A plan a becomes K^-1 a, the identity on the old robot."""
    rows = linear_robot(jr.key(0), gain)
    policy = transformed(uniform_policy(2), exact, *rows, jr.key(1), given_plan, steps=400)
    intended = jr.uniform(jr.key(2), (200, 2), minval=-0.8, maxval=0.8)
    found = jax.vmap(policy.transform)(jr.normal(jr.key(3), (200, 2)), intended @ gain.T)
    assert jnp.sqrt(jnp.mean((found - intended) ** 2)) < 0.05


def test_only_the_flow_that_is_given_the_plan_reverses_an_action():
    """In one dimension a flow of x alone keeps the order of its starts, and K = -.8 reverses it."""
    for given_plan in (True, False):
        key = jr.key(4)
        obs, action = jr.normal(key, (1000, 1)), jr.uniform(jr.fold_in(key, 1), (1000, 1), minval=-1.0)
        inverse = lambda s, s_next: s_next - s
        policy = transformed(
            uniform_policy(1), inverse, obs, action, obs - 0.8 * action, jr.key(5), given_plan, steps=400
        )
        plans = jnp.linspace(-0.7, 0.7, 41)[:, None]
        found = jax.vmap(policy.transform)(jnp.zeros((41, 1)), plans)[:, 0]
        error = jnp.sqrt(jnp.mean((found + plans[:, 0] / 0.8) ** 2))
        if given_plan:
            assert error < 0.05
        else:
            assert error > 0.3 and (jnp.diff(found) > -1e-3).all()


def test_an_inverse_model_of_a_linear_robot_is_linear():
    obs, action, next_obs = linear_robot(jr.key(6), jnp.eye(2))
    model = inverse_model(obs, action, next_obs, jr.key(7), steps=500)
    fresh = linear_robot(jr.key(8), jnp.eye(2), 200)
    found = jax.vmap(model)(fresh[0], fresh[2])
    assert jnp.sqrt(jnp.mean((found - fresh[1]) ** 2)) < 0.05


def test_they_are_saved_as_any_policy(tmp_path):
    rows = linear_robot(jr.key(0), TURNED, 50)
    spec = EnvSpec(2, 2, 1, None, True)
    for i, policy in enumerate(
        (
            adapted(uniform_policy(2), rows[0], rows[2], jr.key(1), steps=2, batch=8),
            transformed(uniform_policy(2), exact, *rows, jr.key(1), steps=2),
        )
    ):
        save_policy(tmp_path / str(i), policy, spec, "jax:multi-goal")
        loaded = load_policy(tmp_path / str(i))[0]
        np.testing.assert_array_equal(policy(rows[0][0], jr.key(2)), loaded(rows[0][0], jr.key(2)))


def test_what_does_not_fit_is_refused():
    rows = linear_robot(jr.key(0), TURNED, 50)
    with pytest.raises(UserError, match="same numbers"):
        adapted(uniform_policy(2), rows[0], rows[2][:, :1], jr.key(1))
    with pytest.raises(UserError, match="row for each"):
        transformed(uniform_policy(2), exact, rows[0][:9], *rows[1:], jr.key(1))
