"""The EnvPool adapter: episode ends, action range, seeds, and agreement with dm_control."""

import jax
import numpy as np
import pytest

from contraflow.core.types import UserError
from contraflow.envs.base import derive_seed
from contraflow.envs.envpool import EnvPool

envpool = pytest.importorskip("envpool")
KEY = jax.random.key(0)


def raw(id, num_envs, **settings):
    """EnvPool itself, in the episodes that `EnvPool(id, num_envs, 0).reset(KEY)` starts."""
    return envpool.make_gymnasium(id, num_envs=num_envs, seed=derive_seed(0, KEY), **settings)


def actions(steps, n, dim, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (steps, n, dim)).astype(np.float32)


@pytest.mark.parametrize(
    ("id", "obs_dim", "action_dim", "length"),
    [
        ("CheetahRun-v1", 17, 6, 1000),
        ("HalfCheetah-v5", 17, 6, 1000),
        ("MetaWorld/Reach-v3", 39, 4, 500),
        ("AdroitHandDoor-v1", 39, 28, 200),
        ("FrankaKitchen-v1", 93, 9, 280),
    ],
)
def test_shapes_and_types(id, obs_dim, action_dim, length):
    env = EnvPool(id, 2)
    spec = env.spec
    assert (spec.obs_dim, spec.action_dim, spec.num_envs, spec.episode_length) == (obs_dim, action_dim, 2, length)
    assert not spec.jittable
    state, obs = env.reset(KEY)
    assert obs.shape == (2, obs_dim) and obs.dtype == np.float32
    _, step = env.step(state, jax.numpy.zeros((2, action_dim)))
    assert step.obs.shape == step.next_obs.shape == (2, obs_dim)
    assert step.reward.dtype == step.obs.dtype == np.float32
    assert step.reward.shape == step.terminated.shape == step.truncated.shape == (2,)
    assert step.valid.all() and step.terminated.dtype == step.truncated.dtype == step.valid.dtype == np.bool_
    env.close()


def test_dict_observations_in_sorted_key_order():
    env, pool = EnvPool("CheetahRun-v1", 2), raw("CheetahRun-v1", 2)
    parts = pool.reset()[0]
    want = np.concatenate([parts["position"], parts["velocity"]], axis=1)
    np.testing.assert_array_equal(env.reset(KEY)[1], want.astype(np.float32))


@pytest.mark.filterwarnings("ignore:.*precision lowered")
def test_actions_are_rescaled():
    env, pool = EnvPool("Pendulum-v1", 3), raw("Pendulum-v1", 3)  # torque in [-2, 2]
    pool.reset()
    state, _ = env.reset(KEY)
    for a in actions(20, 3, 1):
        state, step = env.step(state, a)
        obs, reward, *_ = pool.step(2 * a)
        np.testing.assert_allclose(step.next_obs, obs, atol=1e-5)
        np.testing.assert_allclose(step.reward, reward, atol=1e-4)


def test_time_limit_is_truncation():
    """dm_control episodes last 1000 steps and never terminate; nothing is lost between two of them."""
    env = EnvPool("CartpoleSwingup-v1", 2)
    state, _ = env.reset(KEY)
    ends = []
    for i, a in enumerate(actions(2500, 2, 1), start=1):
        state, step = env.step(state, a)
        assert not step.terminated.any() and step.valid.all()
        if step.truncated.any():
            assert step.truncated.all()
            ends.append(i)
            assert not np.allclose(step.obs, step.next_obs, atol=1e-3)
    assert ends == [1000, 2000]


def test_next_obs_at_the_limit_is_the_true_successor():
    """A pool that runs on past our limit says what the twentieth successor is."""
    env, pool = EnvPool("CartpoleSwingup-v1", 2, episode_length=20), raw("CartpoleSwingup-v1", 2)
    pool.reset()
    state, start = env.reset(KEY)
    for i in range(20):
        state, step = env.step(state, np.ones((2, 1)))
        parts = pool.step(np.ones((2, 1)))[0]
        want = np.concatenate([parts["position"], parts["velocity"]], axis=1)
        np.testing.assert_allclose(step.next_obs, want, atol=1e-6)
        assert step.truncated.tolist() == [i == 19] * 2
    assert np.abs(step.next_obs[:, 3]).min() > 1
    assert np.abs(step.obs[:, 3:]).max() < 0.1  # a new start: nearly at rest
    assert not np.allclose(step.obs, start, atol=1e-4)


def test_falls_terminate_and_leave_no_dummy_step():
    """Hopper copies fall at different times; alive steps earn about 1, so a dummy row (reward 0) shows."""
    env = EnvPool("Hopper-v5", 4)
    state, obs = env.reset(KEY)
    falls, fresh = np.zeros(4, int), np.zeros(4, bool)
    for a in actions(300, 4, 3):
        state, step = env.step(state, a)
        assert (step.reward[fresh] > 0.5).all() and not np.allclose(step.next_obs, obs)
        fresh = step.terminated | step.truncated
        np.testing.assert_array_equal(step.obs[~fresh], step.next_obs[~fresh])
        starts = step.obs[fresh]  # Hopper starts at height 1.25 and rest, with noise of 0.005
        assert (np.abs(starts[:, 0] - 1.25) < 0.006).all() and (np.abs(starts[:, 5:]) < 0.006).all()
        assert (np.abs(step.next_obs[fresh][:, 5:]).max(axis=1, initial=1) > 0.1).all()
        falls, obs = falls + step.terminated, step.obs
        assert not step.truncated.any()
    assert (falls >= 3).all() and len(set(falls)) > 1


def test_a_fall_at_the_limit_is_both():
    """EnvPool itself reports such a step as truncated only, which would bootstrap through the fall."""
    a = actions(400, 1, 3, seed=1)

    def first_end(length):
        env = EnvPool("Hopper-v5", 1, episode_length=length)
        state, _ = env.reset(KEY)
        for i in range(400):
            state, step = env.step(state, a[i])
            if step.terminated[0] or step.truncated[0]:
                return i + 1, bool(step.terminated[0]), bool(step.truncated[0])

    fall, terminated, truncated = first_end(1000)
    assert terminated and not truncated
    assert first_end(fall) == (fall, True, True)
    assert first_end(fall - 1) == (fall - 1, False, True)


def test_rows_belong_to_their_copies():
    """A step of all copies is that of a part which happens to be all: rows are not in the order of the threads."""
    pools = [EnvPool("Hopper-v5", 8, seed=3) for _ in range(2)]
    for pool in pools:
        pool.reset(KEY)
    for action in actions(60, 8, 3):
        _, whole = pools[0].step(None, action)
        _, part = pools[1].step(None, action, active=np.ones(8, bool))
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
            np.testing.assert_array_equal(a, b)
        assert len(np.unique(whole.next_obs[:, 0])) == 8  # copies that can be told apart


def test_reset_follows_key_and_seed():
    def start(seed, key=KEY):
        return EnvPool("CheetahRun-v1", 4, seed).reset(key)[1]

    env = EnvPool("CheetahRun-v1", 4, 0)
    first = env.reset(KEY)[1]
    np.testing.assert_array_equal(first, env.reset(KEY)[1])
    np.testing.assert_array_equal(first, start(0))
    everything = np.concatenate([first, start(1), start(2), start(0, jax.random.key(1))])
    assert len(np.unique(everything, axis=0)) == 16  # EnvPool's own seeds s and s + 1 share three of four episodes


@pytest.mark.parametrize("culprit", ["observation", "reward"])
def test_non_finite_is_a_user_error(culprit):
    class Broken:
        def step(self, action):
            obs, reward = np.zeros((1, 3)), np.zeros(1)
            (obs if culprit == "observation" else reward)[0] = np.nan
            return obs, reward, np.zeros(1, bool), np.zeros(1, bool), {"elapsed_step": np.ones(1)}

    env = EnvPool("Pendulum-v1", 1)
    env._pool = Broken()
    with pytest.raises(UserError, match=f"non-finite {culprit}"):
        env.step(None, np.zeros((1, 1)))


def test_unfit_environments_are_refused():
    with pytest.raises(UserError, match="choose one with continuous"):
        EnvPool("CartPole-v1", 1)
    with pytest.raises(UserError, match="did you mean envpool:CheetahRun-v1"):
        EnvPool("CheetaRun-v1", 1)
    with pytest.raises(UserError, match="render=True"):
        EnvPool("Pendulum-v1", 1).frame()


def set_cartpole(physics, obs):
    x, cos, sin = obs["position"][0]
    physics.data.qpos[:] = x, np.arctan2(sin, cos)


def set_pendulum(physics, obs):
    cos, sin = obs["orientation"][0]
    physics.data.qpos[:] = np.arctan2(sin, cos)


def set_acrobot(physics, obs):
    sin1, sin2, cos1, cos2 = obs["orientations"][0]
    upper = np.arctan2(sin1, cos1)
    physics.data.qpos[:] = upper, np.arctan2(sin2, cos2) - upper


def set_planar(physics, obs):
    """Without the forward position, which is not observed and on which nothing depends."""
    physics.data.qpos[:] = 0, *obs["position"][0]


def set_position(physics, obs):
    physics.data.qpos[:] = obs["position"][0]


def set_reacher(physics, obs):
    import mujoco

    physics.data.qpos[:] = obs["position"][0]
    mujoco.mj_kinematics(physics.model.ptr, physics.data.ptr)
    target = physics.named.data.geom_xpos["finger", :2] + obs["to_target"][0]
    physics.named.model.geom_pos["target", ["x", "y"]] = target


def held(steps, dim):
    return np.repeat(actions(steps // 5, 1, dim, seed=3), 5, axis=0) * 1.5  # clipped: reaches the bounds often


def to_centre(physics):
    return (-20 * physics.data.qpos - 4 * physics.data.qvel)[None]


def to_target(physics):
    """Jacobian transpose of the reacher's finger."""
    import mujoco

    jacobian = np.zeros((3, 2))
    mujoco.mj_jacGeom(physics.model.ptr, physics.data.ptr, jacobian, None, physics.model.name2id("finger", "geom"))
    return (200 * jacobian[:2].T @ physics.finger_to_target() - 0.5 * physics.data.qvel)[None]


@pytest.mark.parametrize(
    ("id", "shimmy_id", "place", "control", "earns"),
    [
        ("CartpoleSwingup-v1", "cartpole-swingup", set_cartpole, None, True),
        ("CheetahRun-v1", "cheetah-run", set_planar, None, True),
        ("HopperStand-v1", "hopper-stand", set_planar, None, False),
        ("PendulumSwingup-v1", "pendulum-swingup", set_pendulum, None, False),
        ("AcrobotSwingup-v1", "acrobot-swingup", set_acrobot, None, False),
        ("PointMassEasy-v1", "point_mass-easy", set_position, to_centre, True),
        ("ReacherEasy-v1", "reacher-easy", set_reacher, to_target, True),
        ("BallInCupCatch-v1", "ball_in_cup-catch", set_position, None, False),
    ],
)
def test_agrees_with_dm_control(id, shimmy_id, place, control, earns):
    """Same start, same actions for 200 steps: observations within 1e-5, rewards within 1e-5 (float32 rounding).

    Covers both adapters, whose flat observations must come in the same order. Only tasks whose observation determines
    the state are compared. BallInCupCatch agrees in physics but EnvPool pays for the catch a few millimetres too early.
    """
    pytest.importorskip("shimmy")
    pytest.importorskip("dm_control")
    from contraflow.envs.gymnasium import Gymnasium

    pool, suite = EnvPool(id, 1), Gymnasium(f"dm_control/{shimmy_id}-v0", 1)
    _, obs = pool.reset(KEY)
    state, _ = suite.reset(KEY)
    physics = suite._copies[0].unwrapped._env.physics
    start = raw(id, 1).reset()[0]  # the same start in float64
    with physics.reset_context():
        place(physics, start)
        physics.data.qvel[:] = start["velocity"][0]

    open_loop, paid = held(200, pool.spec.action_dim), 0.0
    for i in range(200):
        a = np.clip(open_loop[i] if control is None else control(physics), -1, 1)
        _, ours = pool.step(None, a)
        state, theirs = suite.step(state, a)
        np.testing.assert_allclose(ours.next_obs, theirs.next_obs, atol=1e-5, rtol=1e-5)
        if id == "BallInCupCatch-v1":
            assert ours.reward[0] >= theirs.reward[0]
        else:
            np.testing.assert_allclose(ours.reward, theirs.reward, atol=1e-5)
        assert not np.allclose(ours.next_obs, obs, atol=1e-7) or control is not None
        paid, obs = max(paid, float(theirs.reward[0])), ours.next_obs
    assert not earns or paid > 0.02, "the comparison of rewards compared zeros"
