"""`make` and `available`: ids, errors that name the remedy, lazy imports, pictures."""

import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
import pytest

from contraflow.core.types import EnvSpec, UserError
from contraflow.envs import KINDS, available, check, copies, jittable, make
from contraflow.envs.base import from_table, rescale
from contraflow.envs.probe import PROBES


class Mine:
    def __init__(self, num_envs, seed):
        self.arguments = num_envs, seed
        self.spec = EnvSpec(1, 1, num_envs, None, jittable=False)

    def reset(self, key): ...

    def step(self, state, action): ...


@pytest.mark.parametrize(
    ("id", "package", "dims"),
    [
        ("envpool:CartpoleSwingup-v1", "envpool", (5, 1)),
        ("gym:Pendulum-v1", "gymnasium", (3, 1)),
        ("Pendulum-v1", "gymnasium", (3, 1)),
        ("jax:pendulum", "jax", (3, 1)),
        ("jax:cartpole-swingup", "jax", (5, 1)),
        ("probe:two-step", "jax", (1, 1)),
        ("bandit:linear", "jax", (1, 2)),
        ("bandit:two-peak/8", "jax", (1, 8)),
    ],
)
def test_make(id, package, dims):
    pytest.importorskip(package)
    env = make(id, 3, 0)
    assert (env.spec.obs_dim, env.spec.action_dim) == dims and env.spec.num_envs == 3
    state, obs = env.reset(jax.random.key(0))
    _, step = env.step(state, jax.numpy.zeros((3, dims[1])))
    assert obs.shape == step.obs.shape == (3, dims[0])


@pytest.mark.parametrize(
    ("id", "says"),
    [
        ("HalfCheeta-v5", "did you mean gym:HalfCheetah-v5"),
        ("envpool:cheetah-run", "did you mean envpool:CheetahRun-v1"),
        ("probe:twostep", "did you mean probe:two-step"),
        ("jax:cartpole", "did you mean jax:cartpole-swingup"),
        ("jax:x", "there are pendulum, cartpole-swingup"),
        ("bandit:x", "there are constant, linear, two-peak"),
        ("bandit:linear/0", "did you mean bandit:linear"),
        ("bandit:linear/-1", "did you mean bandit:linear"),
        ("gym:", "unknown environment"),
        ("", "unknown environment"),
        ("zzzz", "available"),
        ("HalfCheetah-v3", "another id or version"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*out of date:DeprecationWarning")
def test_unknown_ids(id, says):
    pytest.importorskip("gymnasium")
    pytest.importorskip("envpool")
    with pytest.raises(UserError, match=says) as error:
        make(id, 1, 0)
    assert "\n" not in str(error.value)
    if id == "HalfCheetah-v3":
        return  # registered still: only building it shows that it is gone
    with pytest.raises(UserError, match=says) as looked_up:
        check(id)
    assert str(looked_up.value) == str(error.value)


def test_users_class_needs_trust(monkeypatch):
    monkeypatch.setitem(sys.modules, "somebodys_env", sys.modules[__name__])
    env: Any = make("somebodys_env:Mine", 3, 7, trust="all")
    assert env.env.arguments == (3, 7)
    for id in ("somebodys_env:Mine", "gym:somebodys_env:Mine-v0"):
        for named in (make, check):
            with pytest.raises(UserError, match="--trust"):
                named(id)
    for id in ("somebodys_env:Absent", "absent_module:Mine"):
        with pytest.raises(UserError, match="cannot be loaded"):
            make(id, 3, 7, trust="all")
        with pytest.raises(UserError, match="cannot be loaded"):
            check(id, trust="all")


def test_what_can_be_made_passes_the_check(monkeypatch):
    """Without building a simulator, and without calling the user's class."""
    gymnasium, envpool = pytest.importorskip("gymnasium"), pytest.importorskip("envpool")
    monkeypatch.setitem(sys.modules, "somebodys_env", sys.modules[__name__])
    for module, name in ((gymnasium, "make"), (envpool, "make_gymnasium"), (Mine, "__init__")):
        monkeypatch.setattr(module, name, None)
    for id in ("envpool:CartpoleSwingup-v1", "gym:Pendulum-v1", "Pendulum-v1", "probe:two-step", "bandit:linear/8"):
        check(id)
    check("somebodys_env:Mine", trust="all")
    with pytest.raises(UserError, match="failed in init"):  # building would have been noticed
        make("somebodys_env:Mine", trust="all")


@pytest.mark.parametrize(
    ("id", "absent", "install"),
    [
        ("envpool:CheetahRun-v1", "envpool", r"pip install \"contraflow\[envpool\]\""),
        ("gym:Pendulum-v1", "gymnasium.vector", r"pip install \"contraflow\[mujoco\]\""),
        ("dm_control/cheetah-run-v0", "shimmy", r"pip install \"contraflow\[dmc\]\""),
    ],
)
def test_missing_packages_name_the_command(monkeypatch, id, absent, install):
    pytest.importorskip("gymnasium")
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(UserError, match=install):
        make(id, 1, 0)


def test_numbers_and_pictures_are_checked():
    with pytest.raises(UserError, match="num_envs >= 1"):
        make("probe:obs", 0, 0)
    with pytest.raises(UserError, match="cannot be rendered"):
        make("probe:obs", 1, 0, render=True)


def test_a_kind_is_added_in_one_place(monkeypatch):
    """A row of the table: everything else follows."""
    monkeypatch.setitem(KINDS, "puzzle", from_table("puzzle", {"first": PROBES["obs"]}))
    assert make("puzzle:first", 3) == PROBES["obs"](3)
    assert available()["puzzle"] == ["first"] and jittable("puzzle:first")
    for call in (make, check, jittable):
        with pytest.raises(UserError, match="unknown environment puzzle:zzzz; there are first"):
            call("puzzle:zzzz")
    with pytest.raises(UserError, match="did you mean puzzle:first"):
        check("puzzle:firts")


def test_available():
    pytest.importorskip("envpool")
    ids = available()
    assert set(ids) == {"envpool", "gym", "playground", "ogbench", "jax", "probe", "bandit", "align"}
    assert {"CheetahRun-v1", "HalfCheetah-v5", "MetaWorld/Reach-v3", "AdroitHandDoor-v1"} < set(ids["envpool"])
    assert {"FrankaKitchen-v1", "PandaPickCube-v1"} < set(ids["envpool"])
    assert {"HalfCheetah-v5", "Pendulum-v1"} < set(ids["gym"])
    if find_spec("dm_control"):
        assert "dm_control/cheetah-run-v0" in ids["gym"]
    assert not {"CartPole-v1", "Pong-v5", "Hopper-v4"} & set(ids["envpool"])


def test_rescale():
    low, high = np.array([-2.0, 0.0], np.float32), np.array([2.0, 10.0], np.float32)
    got = rescale(jax.numpy.array([[-1.0, -1.0], [1.0, 1.0], [0.5, 0.0], [-9.0, 9.0]]), low, high)
    np.testing.assert_allclose(got, [[-2, 0], [2, 10], [1, 5], [-2, 10]])
    assert got.dtype == np.float32


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=os.environ | environment, capture_output=True, text=True
    )


def test_import_is_light():
    done = run("""
        import sys, contraflow.envs.playground
        contraflow.envs.playground.available()
        heavy = {"envpool", "gymnasium", "shimmy", "dm_control", "mujoco", "mujoco_playground"} & set(sys.modules)
        sys.exit(str(heavy) if heavy else 0)
    """)
    assert done.returncode == 0, done.stderr


def test_pictures():
    """EGL, in a process of its own: a renderer without an OpenGL context aborts the process that asks for it."""
    for package in ("envpool", "shimmy", "dm_control"):
        pytest.importorskip(package)
    done = run(
        """
        import jax, numpy as np
        from contraflow.envs import make
        for id in ("envpool:CheetahRun-v1", "gym:dm_control/cheetah-run-v0", "gym:HalfCheetah-v5"):
            env = make(id, 1, 0, render=True)
            state, _ = env.reset(jax.random.key(0))
            before = env.frame().astype(int)
            for _ in range(20):
                state, _ = env.step(state, np.ones((1, 6)))
            after = env.frame()
            assert after.dtype == np.uint8 and after.ndim == 3 and after.shape[2] == 3 and min(after.shape[:2]) >= 200
            assert after.std() > 10 and (np.abs(after - before) > 20).mean() > 0.003, id
            env.close()
        """,
        MUJOCO_GL="egl",
    )
    if "no OpenGL context" in done.stderr:
        pytest.skip("no EGL here")
    assert done.returncode == 0, done.stderr


def test_evaluations_make_few_copies_of_what_is_large():
    assert copies("jax:pendulum", 50) == copies("gym:Pendulum-v1", 50) == 50
    assert copies("ogbench:cube-single-play-singletask-task1-v0", 50) == 10
    assert copies("ogbench:cube-single-play-singletask-task1-v0", 4) == 4
