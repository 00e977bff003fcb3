"""The tasks of `jax:`: the pendulum is Gymnasium's, the cartpole dm_control's; mechanics hold; ends are truncations."""

import warnings

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.envs import TASKS, control, make
from contraflow.envs.control import CartpoleSwingup, Pendulum
from contraflow.envs.episodes import TaskState

rng = np.random.default_rng


def at(env, body, age=0):
    """A state with these bodies [N, s]."""
    body = jnp.asarray(body, jnp.float32)
    return TaskState(body, jnp.full(len(body), age, jnp.int32), jr.key(0))


def episode(env, bodies, actions):
    """Steps with leading [T] from bodies [N, s] under actions [T, N, 1], compiled as one scan."""
    run = jax.jit(lambda s, a: jax.lax.scan(env.step, s, a)[1])
    return jax.device_get(run(at(env, bodies), jnp.asarray(actions, jnp.float32)))


# the pendulum


@pytest.fixture
def gym_pendulum():
    pytest.importorskip("gymnasium")
    return make("gym:Pendulum-v1", 1, 0)


def set_pendulum(env, angle, speed):
    env.reset(jr.key(0))
    env._copies[0].unwrapped.state = np.array([angle, speed], float)


def test_pendulum_equals_gymnasium_from_any_state(gym_pendulum):
    """300 states and actions, speeds at the limit and actions beyond it among them."""
    random = rng(0)
    bodies = np.stack([random.uniform(-np.pi, np.pi, 300), random.uniform(-8, 8, 300)], 1)
    actions = random.uniform(-1.5, 1.5, (300, 1))
    _, ours = jax.jit(Pendulum(300).step)(at(Pendulum(300), bodies), jnp.asarray(actions, jnp.float32))
    ours = jax.device_get(ours)
    for i in range(300):
        set_pendulum(gym_pendulum, *bodies[i])
        _, theirs = gym_pendulum.step(np.zeros(1, bool), actions[i : i + 1])
        np.testing.assert_allclose(ours.next_obs[i], theirs.next_obs[0], atol=3e-6)
        np.testing.assert_allclose(ours.reward[i], theirs.reward[0], rtol=2e-6, atol=1e-6)
    assert np.any(np.abs(ours.next_obs[:, 2]) == 8)


def test_pendulum_equals_gymnasium_for_an_episode(gym_pendulum):
    """200 steps without setting anything in between: float32 against float64, and both truncate at the last."""
    actions = np.clip(2 * rng(1).standard_normal((200, 1, 1)), -1, 1)
    ours = episode(Pendulum(), [[2.5, 0.7]], actions)
    set_pendulum(gym_pendulum, 2.5, 0.7)
    state = np.zeros(1, bool)
    for t in range(200):
        state, theirs = gym_pendulum.step(state, actions[t])
        np.testing.assert_allclose(ours.next_obs[t], theirs.next_obs, atol=2e-4)
        np.testing.assert_allclose(ours.reward[t], theirs.reward, rtol=1e-4, atol=1e-4)
        assert bool(ours.truncated[t, 0]) == bool(theirs.truncated[0]) == (t == 199)
    assert gym_pendulum.spec.episode_length == Pendulum().spec.episode_length


# the cartpole


def energy(body):
    """Of cart and pole, written down anew: the pole is a point of its mass at its middle that also turns."""
    _, angle, dx, dangle = body
    v = jnp.stack([dx + control.CENTRE * jnp.cos(angle) * dangle, -control.CENTRE * jnp.sin(angle) * dangle])
    turning = control.INERTIA - control.POLE * control.CENTRE**2
    kinetic = (control.CART * dx**2 + control.POLE * jnp.sum(v**2) + turning * dangle**2) / 2
    return kinetic + control.POLE * control.GRAVITY * control.CENTRE * jnp.cos(angle)


def momentum(body):
    _, angle, dx, dangle = body
    return control.CART * dx + control.POLE * (dx + control.CENTRE * jnp.cos(angle) * dangle)


def power(body, force):
    """What the force puts into the energy, and friction takes out of it."""
    _, _, dx, dangle = body
    return force * dx - control.SLIDER_DAMPING * dx**2 - control.HINGE_DAMPING * dangle**2


def test_cartpole_keeps_the_books_of_energy_and_momentum():
    """At any state and force d(energy)/dt is the power and d(momentum)/dt the outer force: two equations for the two
    accelerations."""
    bodies = jnp.asarray(rng(2).uniform(-1, 1, (500, 4)) * [1.7, np.pi, 3, 10], jnp.float32)
    forces = jnp.asarray(rng(3).uniform(-10, 10, 500), jnp.float32)
    rates = jax.vmap(control.cartpole_rates)(bodies, forces)
    gained = jax.vmap(lambda b, r: jax.jvp(energy, (b,), (r,))[1])(bodies, rates)
    np.testing.assert_allclose(gained, jax.vmap(power)(bodies, forces), atol=2e-4)
    pushed = jax.vmap(lambda b, r: jax.jvp(momentum, (b,), (r,))[1])(bodies, rates)
    np.testing.assert_allclose(pushed, forces - control.SLIDER_DAMPING * bodies[:, 2], atol=1e-4)
    np.testing.assert_array_equal(rates[:, :2], bodies[:, 2:])


def test_cartpole_conserves_energy_without_friction_and_force(monkeypatch):
    """Ten seconds of a pole that goes over the top; with friction it loses what friction takes."""
    env, zero = CartpoleSwingup(1), jnp.zeros(1)
    start = jnp.array([0.0, 2.0, 0.1703, 9.0])  # no momentum: the cart stays on the rail

    def energies():
        # Not `step`: after the last of these steps a new episode begins.
        _, bodies = jax.jit(lambda b: jax.lax.scan(lambda b, _: (env.move(b, zero)[0],) * 2, b, None, 1000))(start)
        assert np.ptp(bodies[:, 1]) > 6 and np.abs(bodies[:, 0]).max() < control.RAIL
        return np.asarray(jax.vmap(energy)(bodies)), bodies

    first = float(energy(start))
    got, bodies = energies()
    lost = 0.01 * np.sum(jax.vmap(lambda b: power(b, 0.0))(bodies))
    assert lost < -1e-3
    np.testing.assert_allclose(got[-1] - first, lost, atol=3e-4)
    monkeypatch.setattr(control, "SLIDER_DAMPING", 0.0)
    monkeypatch.setattr(control, "HINGE_DAMPING", 0.0)
    got, _ = energies()
    np.testing.assert_allclose(got, first, atol=2e-4)


@pytest.fixture(scope="module")
def suite():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dm_control looks for a display and says so when there is none
        suite = pytest.importorskip("dm_control.suite")
        env = suite.load("cartpole", "swingup")
        env.reset()
    return env


def set_cartpole(env, body):
    env.reset()
    with env.physics.reset_context():
        env.physics.data.qpos[:], env.physics.data.qvel[:] = body[:2], body[2:]


def test_cartpole_parameters_are_those_of_dm_control(suite):
    model = suite.physics.model
    assert [*model.body_mass[1:], model.body_ipos[2, 2]] == [control.CART, control.POLE, control.CENTRE]
    np.testing.assert_allclose(control.INERTIA, model.body_inertia[2, 0] + control.POLE * control.CENTRE**2, rtol=1e-12)
    assert list(model.dof_damping) == [control.SLIDER_DAMPING, control.HINGE_DAMPING]
    assert model.opt.gravity[2] == -control.GRAVITY and model.jnt_range[0, 1] == control.RAIL
    assert suite._step_limit == CartpoleSwingup().spec.episode_length and suite.control_timestep() == 0.01


@pytest.mark.parametrize(
    ("body", "push", "tolerance"),
    [
        ([0.0, np.pi - 0.1, 0.0, 0.0], None, 1e-5),
        ([0.1, 0.3, -0.5, 12.0], None, 1e-5),
        ([1.2, -1.0, 1.5, -3.0], 1.0, 1e-4),  # into the end of the rail, and kept there
        ([-1.5, 2.0, -4.0, 3.0], None, 1e-4),
    ],
)
def test_cartpole_follows_dm_control(suite, body, push, tolerance):
    """150 steps without setting anything in between; reward and observation after each."""
    actions = rng(4).uniform(-1, 1, (150, 1, 1)) if push is None else np.full((150, 1, 1), push)
    ours = episode(CartpoleSwingup(), [body], actions)
    set_cartpole(suite, body)
    farthest = 0.0
    for t in range(150):
        theirs = suite.step(actions[t, 0])
        obs = np.concatenate([theirs.observation["position"], theirs.observation["velocity"]])
        # Relative to the ranges: 20 rad/s and 4 m/s are common.
        np.testing.assert_allclose(ours.next_obs[t, 0], obs, atol=tolerance, rtol=tolerance, err_msg=f"step {t}")
        np.testing.assert_allclose(ours.reward[t, 0], theirs.reward, atol=tolerance)
        farthest = max(farthest, abs(obs[0]))
    assert (farthest > control.RAIL) == (abs(body[0]) > 1), "the end of the rail was meant to be reached, or not to be"


def test_cartpole_reward_is_that_of_dm_control(suite):
    random = rng(5)
    for _ in range(100):
        body, action = random.uniform(-1, 1, 4) * [2, np.pi, 3, 12], random.uniform(-1, 1, 1)
        set_cartpole(suite, body)
        suite.physics.set_control(action)
        got = control.cartpole_reward(jnp.asarray(body, jnp.float32), jnp.asarray(action, jnp.float32))
        np.testing.assert_allclose(got, suite.task.get_reward(suite.physics), atol=1e-6)


def test_the_sparse_reward_is_that_of_dm_control(suite):
    """Around both bounds, which are at cos(.1) = .995 and .25 m."""
    from dm_control.suite.cartpole import Balance

    task, paid = Balance(swing_up=True, sparse=True), []
    for body in rng(6).uniform(-1, 1, (60, 4)) * [0.5, 0.2, 3, 12]:
        set_cartpole(suite, body)
        paid.append(float(control.cartpole_sparse_reward(jnp.asarray(body, jnp.float32))))
        assert paid[-1] == task.get_reward(suite.physics)
    assert 5 < sum(paid) < 55


def test_cartpole_starts_as_dm_control_does(suite):
    """Spreads of 300 starts of each: .01 around rest in the middle, the pole hanging."""
    _, ours = CartpoleSwingup(300).reset(jr.key(0))
    theirs = [suite.reset().observation for _ in range(300)]
    theirs = np.array([[*obs["position"], *obs["velocity"]] for obs in theirs])
    np.testing.assert_allclose(ours.mean(0), theirs.mean(0), atol=3e-3)
    ours, theirs = (np.delete(obs.std(0), 1) for obs in (np.asarray(ours), theirs))  # the cosine hardly moves
    np.testing.assert_allclose(ours, theirs, rtol=0.15)


# both


@pytest.mark.parametrize("name", TASKS)
def test_ends_are_truncations_and_the_last_observation_is_true(name):
    """Copies of different age: each is reset on its own, within the step that ends it."""
    env = make(f"jax:{name}", 4, 0)
    limit = env.spec.episode_length
    state, _ = env.reset(jr.key(0))
    state = TaskState(state.body, jnp.array([0, limit - 1, limit - 2, limit - 1], jnp.int32), state.key)
    action = jnp.full((4, env.spec.action_dim), 0.7)
    truth = jax.jit(lambda b: jax.vmap(env.observe)(jax.vmap(env.move)(b, action)[0]))(state.body)
    after, step = jax.jit(env.step)(state, action)
    ended = np.array([False, True, False, True])
    np.testing.assert_array_equal(step.truncated, ended)
    assert not step.terminated.any() and step.valid.all()
    np.testing.assert_allclose(step.next_obs, truth, atol=1e-6)
    np.testing.assert_array_equal(step.obs[~ended], step.next_obs[~ended])
    assert (np.abs(step.obs - step.next_obs).max(1) > 1e-4)[ended].all()
    assert not np.array_equal(step.obs[1], step.obs[3]), "copies start differently"
    np.testing.assert_array_equal(after.age, [1, 0, limit - 1, 0])
    np.testing.assert_array_equal(jax.vmap(env.observe)(after.body), step.obs)


@pytest.mark.parametrize("name", TASKS)
def test_the_key_is_all_the_randomness(name):
    env = make(f"jax:{name}", 3, 0)
    reset = jax.jit(env.reset)
    one, two, other = (reset(jr.key(k))[1] for k in (0, 0, 1))
    np.testing.assert_array_equal(one, two)
    assert not np.any(one == other) and len(np.unique(np.asarray(one)[:, 0])) == 3
    assert hash(env) == hash(make(f"jax:{name}", 3, 7)), "equal environments share one compiled program"


@pytest.mark.parametrize("name", TASKS)
def test_actions_outside_the_range_are_clipped(name):
    env = make(f"jax:{name}", 2, 0)
    step = jax.jit(env.step)
    body = np.array([env.start(k) for k in jr.split(jr.key(0), 2)])
    sides = jnp.outer(jnp.array([1.0, -1.0]), jnp.ones(env.spec.action_dim))
    _, beyond = step(at(env, body), 3 * sides)
    _, limit = step(at(env, body), sides)
    np.testing.assert_array_equal(beyond.next_obs, limit.next_obs)
    np.testing.assert_array_equal(beyond.reward, limit.reward)
