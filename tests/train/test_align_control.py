"""Policies aligned with a critic: the known tilt in each state, the command, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.agents.align.tables import M, S, start, table
from tests.cli_helpers import assert_refused, cli
from tests.flow.tilts import Tilt

from contraflow.agents.align.adjoint_matching import AdjointMatching
from contraflow.agents.align.rfm_align import RFMAlign
from contraflow.agents.offline.bc import BC
from contraflow.agents.offline.iql import IQL, Cloned
from contraflow.core.optim import Optim
from contraflow.data.datasets.dataset import build
from contraflow.data.datasets.write import write
from contraflow.envs import make
from contraflow.envs.align import Generation
from contraflow.envs.align.control import Control
from contraflow.flow.model import Ddim, Flow, FlowSpec
from contraflow.nets.critic import Min, Point, QEnsemble
from contraflow.nets.mlp import MLPSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.artifact import load_policy, save_policy
from contraflow.policy.best_of import Argmax, BestOf
from contraflow.policy.flow import FlowPolicy
from contraflow.rl.critics import Critics
from contraflow.training.log import read_evaluations
from contraflow.training.loop import Carry, Learner, World
from contraflow.training.run import Run, write_config
from contraflow.training.sources import Dataset
from contraflow.training.sources.conditions import Align
from contraflow.training.sources.critic import advantage

pytestmark = pytest.mark.usefixtures("allow_rank_promotion")
STATES, STIFF, LAM = jnp.array([[-0.8], [0.0], [0.8]]), 1.5, 0.5


class Bowl(QEnsemble):
    """Q(s, a) = 40 s - STIFF / 2 (a - s)^2: states differ in their level far more than actions do."""

    def __init__(self):
        self.members, self.num, self.head, self.reduce = None, 2, Point(), Min()  # pyright: ignore

    def value(self, obs, action):
        return 40.0 * obs[0] - STIFF / 2 * jnp.sum((action - obs) ** 2)


class PerState(eqx.Module):
    """The field of a table plus c(t) s, which begins as 0: the tilt by a bowl around s has such a field."""

    table: Any
    c: jax.Array

    @property
    def dim(self) -> int:
        return 1

    def __call__(self, x, t, cond):
        place = jnp.linspace(0.0, 1.0, self.c.shape[0])
        return self.table(x, t, cond) + jnp.interp(t / 5.0, place, self.c) * cond


def policy(steps: int) -> Any:
    """N(M, S^2) in every state, and the critic."""
    flow = table(steps)
    flow = Flow(PerState(flow.net, jnp.zeros(steps + 1)), flow.spec)
    return BestOf(FlowPolicy(flow), Bowl(), None, Argmax(4), Argmax(4))


def test_the_reward_is_the_advantage_in_units_of_its_deviation():
    """Over 16 actions of the policy: mean 0 in each state, and a mean square of 1 over the states. 512 are drawn, with
    a deviation of .87: within four standard errors."""
    found = advantage(policy(20), STATES, "critic:x")
    actions = found.policy.particles(STATES[0], jr.key(0), 16)
    rewards = np.asarray(jax.vmap(lambda s: jax.vmap(lambda a: found(a, s))(actions))(STATES))
    np.testing.assert_allclose(rewards.mean(1), 0.0, atol=1e-4)
    assert abs(rewards.var(1, ddof=1).mean() - 1) < 4 * 0.87 / 512**0.5
    q = np.asarray(-STIFF / 2 * (actions - STATES.T) ** 2)  # without the level
    np.testing.assert_allclose(np.ptp(rewards, 1) * float(found.scale), np.ptp(q, 0), rtol=1e-3)


CASES = {
    "rfm-align": (
        RFMAlign(temperature=LAM, particles=8, updates=4, draws=100, optim=Optim(0.03, decay_steps=1200)),
        80,
    ),
    "adjoint-matching": (AdjointMatching(temperature=LAM, minibatches=1, optim=Optim(0.03, decay_steps=400)), 20),
}


@pytest.mark.parametrize("name", CASES)
def test_with_a_quadratic_critic_a_gaussian_policy_becomes_the_tilt_of_each_state(name: str):
    """The precision 1 / s^2 + STIFF / (scale lambda) and the mean that belongs to it, in each state: within 7 % of the
    spread, of which the steps of candidates take 4 %."""
    agent, steps = CASES[name]
    before = policy(steps)
    reward = advantage(before, STATES, "critic:x")
    agent, state = start(agent, before.policy.flow)
    env, zero = Generation(Control(STATES, 1), (reward,)), jnp.zeros((), jnp.int32)
    stage, world = Align(6, 32), World(env.spec, env)

    @jax.jit
    def train(learner):
        body = lambda _, x: stage.iterate(agent, world, Carry(x, None, None), jr.key(1))[0].learner
        return jax.lax.fori_loop(0, 400, body, learner)

    flow = train(Learner(state, None, jnp.zeros(1), zero, jnp.copy(zero))).agent.flow
    for s in np.asarray(STATES):
        tilt = Tilt(M, S, float(s[0]), STIFF, 1 / (LAM * float(reward.scale)))
        mean, std = tilt.fixed_point(steps)[:2] if name == "adjoint-matching" else tilt.tilted
        zero, one = (float(flow.sample(jnp.full(1, x), jnp.asarray(s))[0]) for x in (0.0, 1.0))
        assert abs(zero - mean) < 0.07 * S and abs((one - zero) / std - 1) < 0.07, (s, zero, mean, one - zero, std)


# the command


RATES = ["--eval-every", "64", "--log-every", "64", "--eval-episodes", "2", "--trackers", "--quiet"]
ALIGN = ["--prompts", "4", "--group", "8", *RATES]


def steps_of_pendulum(folder: Path) -> Path:
    """Random steps, under the name of the environment."""
    rng, n = np.random.default_rng(0), 200
    rows = {"obs": rng.normal(size=(n, 3)), "next_obs": rng.normal(size=(n, 3)), "reward": rng.normal(size=n)}
    rows |= {"action": rng.uniform(-1, 1, (n, 1)), "terminated": np.zeros(n, bool), "end": np.arange(n) % 50 == 49}
    write(build(rows, name="data", env="jax:pendulum", low=-1.0, high=1.0), folder / "data.npz")
    return folder / "data.npz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds data, and the folders of two runs on them, with fresh networks: `ifql` has a critic, `bc` has none."""
    place = tmp_path_factory.mktemp("control")
    source = Dataset(str(steps_of_pendulum(place)), "jax:pendulum")
    flow = FlowSpec(network=ResidualMLP(8, 1, 8), solver=Ddim(2))
    ifql = IQL(Cloned(flow, particles=2), value=MLPSpec(8, 1), critic=Critics(width=8, depth=1), normalise_obs="frozen")
    for name, agent in (("ifql", ifql), ("bc", BC(flow))):
        spec = replace(make("jax:pendulum").spec, num_envs=1)
        save_policy(place / name / "policy", agent.policy(agent.init(jr.key(0), spec)), spec, "jax:pendulum")
        write_config(Run(agent, source), place / name)
    return place


def test_a_policy_is_aligned_with_the_critic_of_a_run(folder: Path, tmp_path: Path, monkeypatch):
    """Data and environment are those of the model's run; evaluations play, and the policy keeps their sizes."""
    monkeypatch.chdir(tmp_path)
    flags = ["nft", "--model", folder / "ifql", "--reward", f"critic:{folder / 'ifql'}", *ALIGN]
    code, out, err = cli("align", *flags, "--steps", "64", "--out", "run")
    assert code == 0 and err == "", err
    assert "before " in out and "chosen " in out and "return in jax:pendulum" in out
    settings = json.loads(Path("run", "config.json").read_text())["run"]["source"]
    assert settings["env"] == "jax:pendulum" and settings["data"] == str(folder / "data.npz")
    for row in read_evaluations(Path("run")):  # an episode costs 0 to 16 in each of 200 steps
        assert -3300 < row["return_mean"] < -100
    assert load_policy(Path("run", "policy"))[1].episode_length == 200


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(folder: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["nft", "--model", folder / "ifql", "--reward", f"critic:{folder / 'ifql'}", *ALIGN]
    assert cli("align", *flags, "--steps", "128", "--out", "whole")[0] == 0
    assert cli("align", *flags, "--steps", "64", "--out", "parts")[0] == 0
    assert cli("resume", "parts", "--steps", "128", "--quiet")[0] == 0
    whole, parts = (jax.tree.leaves(load_policy(Path(name, "policy"))[0]) for name in ("whole", "parts"))
    assert all(np.array_equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--model bc --reward critic:bc", ["critic:", "a critic and a flow", "ifql"]),
        ("--model bc/policy --reward critic:ifql", ["names no data", "--data"]),
        ("--model bc --reward critic:nowhere", ["nowhere", "holds no policy"]),
        ("--model bc --reward critic:ifql --env align:digits", ["observations to act on", "--env"]),
        ("--model bc --reward critic:ifql --env jax:cartpole-swingup", ["5 observations", "cartpole"]),
        ("--model bc", ["was not trained on a problem of alignment", "--reward critic:DIR"]),
        ("--model bc --env jax:pendulum --data data.npz", ["need a reward", "critic:DIR"]),
        ("--model bc --env align:digits --reward critic:ifql --data ", ["give --data"]),
    ],
)
def test_mistakes_are_said_in_a_line(flags: str, words: list[str], folder: Path, monkeypatch):
    monkeypatch.chdir(folder)
    assert_refused(["align", "nft", *flags.split(" "), "--out", "new", "--steps", "32"], *words)
