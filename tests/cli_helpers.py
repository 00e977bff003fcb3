"""What the tests of training and of the command line share: tiny runs, and code that a user might bring along."""

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import equinox as eqx
import gymnasium
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from contraflow import SIR, Replay, Run
from contraflow.cli import main
from contraflow.envs.gymnasium import Gymnasium
from contraflow.rl.critics import Critics

ROOT = Path(__file__).parents[1]
ENVIRON = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
COMMAND = [sys.executable, "-m", "contraflow"]

SMALL = SIR(critic=Critics(width=8, depth=1))  # compiles fastest
SOURCE = Replay("probe:obs-action", num_envs=2, collect=10, updates=1, batch_size=8, buffer_size=64)
TINY = Run(SMALL, SOURCE, steps=40, eval_every=20, eval_episodes=2, log_every=10, trackers=())


def with_source(run: Run, **changes: Any) -> Run:
    """The run with other settings of its source."""
    return replace(run, source=replace(run.source, **changes))


FLAGS = [
    "--env",
    "probe:obs-action",
    "--steps",
    "40",
    "--collect",
    "10",
    "--num-envs",
    "2",
    "--updates",
    "1",
    "--batch-size",
    "8",
    "--buffer-size",
    "64",
    "--eval-every",
    "20",
    "--eval-episodes",
    "2",
    "--log-every",
    "10",
    "--trackers",
    "--agent.critic.width",
    "8",
    "--agent.critic.depth",
    "1",
    "--quiet",
]

GUESS = ["train", "tests.cli_helpers:Guess", "--trust", "all", *FLAGS[:-5], "--quiet"]
MAIN = "import sys; from contraflow.cli import main; sys.exit(main(sys.argv[1:]))"


def cli(*args: Any) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code: Any = main([str(arg) for arg in args])
        except SystemExit as stop:
            code = stop.code
    return code or 0, out.getvalue(), err.getvalue()


def in_subprocess(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], env=ENVIRON, text=True, capture_output=True, timeout=300
    )


def assert_refused(args: list[str], *words: str) -> str:
    """Exit code 2, nothing on stdout, one line on stderr with all of `words`."""
    code, out, err = cli(*args)
    assert code == 2, (code, err)
    assert out == "" and "Traceback" not in err
    assert err.startswith("contraflow: error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    missing = [word for word in words if word not in err]
    assert not missing, f"{missing} not in {err}"
    return err


class Pointer(gymnasium.Env):
    """Reward -(a - 1/2)^2 in episodes of 5 steps; `fault` says what to return as (obs, reward) after `sound` steps."""

    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)

    def __init__(self, fault: tuple[float, float] | None = None, sound: int = 12):
        self.fault, self.sound, self.age, self.steps = fault, sound, 0, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.age = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.age, self.steps = self.age + 1, self.steps + 1
        obs, reward = np.full(1, self.age / 5, np.float32), -float((action[0] - 0.5) ** 2)
        if self.fault and self.steps > self.sound:
            obs, reward = obs + self.fault[0], reward + self.fault[1]
        return obs, reward, False, self.age >= 5, {}


def pointer(num_envs: int, seed: int) -> Gymnasium:
    return Gymnasium(Pointer, num_envs, seed)


def nan_observation(num_envs: int, seed: int) -> Gymnasium:
    return Gymnasium(lambda: Pointer((np.nan, 0.0)), num_envs, seed)


def nan_soon(num_envs: int, seed: int) -> Gymnasium:
    return Gymnasium(lambda: Pointer((np.nan, 0.0), sound=3), num_envs, seed)


def infinite_reward(num_envs: int, seed: int) -> Gymnasium:
    return Gymnasium(lambda: Pointer((0.0, np.inf)), num_envs, seed)


def broken_step(num_envs: int, seed: int) -> Gymnasium:
    class Broken(Pointer):
        def step(self, action):
            if self.steps == 12:
                raise RuntimeError("the arm fell off")
            return super().step(action)

    return Gymnasium(Broken, num_envs, seed)


def broken_reset(num_envs: int, seed: int) -> Gymnasium:
    class Broken(Pointer):
        def reset(self, *, seed=None, options=None):
            raise RuntimeError("the arm fell off")

    return Gymnasium(Broken, num_envs, seed)


def far(num_envs: int, seed: int) -> Gymnasium:
    class Far(Pointer):
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float64)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.full(1, 1e9), {}

        def step(self, action):
            obs, *rest = super().step(action)
            return 1e9 + obs.astype(np.float64), *rest

    return Gymnasium(Far, num_envs, seed)


def discrete(num_envs: int, seed: int) -> Gymnasium:
    class Discrete(Pointer):
        action_space = gymnasium.spaces.Discrete(3)

    return Gymnasium(Discrete, num_envs, seed)


def unbounded(num_envs: int, seed: int) -> Gymnasium:
    class Unbounded(Pointer):
        action_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)

    return Gymnasium(Unbounded, num_envs, seed)


class State(eqx.Module):
    bias: Any
    step: Any


class Constant(eqx.Module):
    """Always tanh(bias); with noise while exploring."""

    bias: Any

    def __call__(self, obs, key, greedy=True):
        return jnp.tanh(self.bias + (0.0 if greedy else 1.0) * jr.normal(key, self.bias.shape))


@dataclass(frozen=True)
class Guess:
    """An agent that does next to nothing; `explode_at` updates make its loss infinite."""

    rate: float = 0.5
    explode_at: int = 1_000_000

    def __post_init__(self):
        if self.rate <= 0:
            raise ValueError(f"rate must be positive, got {self.rate}")

    def init(self, key, spec):
        return State(jr.normal(key, (spec.action_dim,)), jnp.zeros((), jnp.int32))

    def policy(self, state):
        return Constant(state.bias)

    def update(self, state, batch, key):
        loss = jnp.where(state.step >= self.explode_at, jnp.inf, jnp.mean(batch.reward))
        return State(state.bias + self.rate * jnp.mean(batch.action, 0), state.step + 1), {"guess_loss": loss}
