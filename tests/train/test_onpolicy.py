"""On-policy and offline runs: bookkeeping, resume, pretrained policies, learning."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import contraflow
from contraflow.agents import BC, DPPO, FPO, PPO, ReinFlow
from contraflow.core.types import UserError
from contraflow.envs.chunk import Chunked
from contraflow.envs.probe import PROBES
from contraflow.flow.fewstep import MeanFlow
from contraflow.flow.path import VP
from contraflow.rl.flow_policy import FlowPolicy
from contraflow.train import run as driver
from contraflow.train.evaluate import evaluate
from contraflow.train.loop import Carry, epoch
from contraflow.train.offline import OfflineRun
from contraflow.train.onpolicy import OnPolicy, OnPolicyRun, decide, first_learner

SMALL = {"width": 8, "depth": 1, "minibatches": 2, "epochs": 2}
POLICY = FlowPolicy(width=16, depth=1, embedding=8, steps=4)
RUN = OnPolicyRun(
    env="jax:pendulum", agent=PPO(**SMALL), steps=192, num_envs=2, unroll=16, eval_every=96, eval_episodes=2,
    log_every=64, trackers=(),
)  # fmt: skip


def start(agent, env, key=0):
    state, obs = env.reset(jr.key(key + 1))
    return Carry(first_learner(agent, env.spec, jr.key(key)), state, jnp.copy(obs))


def test_the_update_sees_what_happened():
    """The rollout handed to the agent, replayed by hand: actions, successors, ends, and steps counted."""
    seen = {}

    class Spy(PPO):
        def update(self, state, rollout, key):
            jax.debug.callback(lambda r: seen.update(rollout=r), rollout)
            return state, {"kl": jnp.zeros(())}

    agent, env = Spy(**SMALL), PROBES["two-step"](3)
    carry = start(agent, env)
    learner, env_state, obs = carry.learner, carry.env, carry.obs
    rows = []
    for i in range(5):
        action, _ = decide(agent, learner.agent, obs, learner.iteration, i, jr.clone(jr.key(7)))
        env_state, step = env.step(env_state, action)
        rows.append((obs, step.reward, step.next_obs, step.terminated))
        obs = step.obs
    carry, metrics, _ = epoch(OnPolicy(5), agent, env, start(agent, env), jr.key(7), 1)
    jax.effects_barrier()
    rollout = seen["rollout"]
    for got, want in zip(
        (rollout.obs, rollout.reward, rollout.next_obs, rollout.terminated), zip(*rows, strict=True), strict=True
    ):
        np.testing.assert_allclose(got, np.stack(want), atol=1e-6)
    assert rollout.extras.action.shape == (5, 3, 1)
    assert carry.learner.steps == 15 and carry.learner.iteration == 1 and metrics["episodes"] == 6


@dataclass(frozen=True)
class Host:
    """A probe as a host environment: NumPy in, NumPy out."""

    env: Any

    @property
    def spec(self):
        return replace(self.env.spec, jittable=False)

    def reset(self, key):
        return jax.tree.map(np.asarray, self.env.reset(key))

    def step(self, state, action):
        state, step = self.env.step(state, jnp.asarray(action))
        return state, jax.tree.map(np.asarray, step)


def test_a_host_environment_gives_the_same_rollout():
    agent, env = PPO(**SMALL), PROBES["two-step"](3)
    states = []
    for one in (env, Host(env)):
        state, obs = env.reset(jr.key(1))
        carry = Carry(first_learner(agent, one.spec, jr.key(0)), state, jnp.copy(obs))
        carry, _, error = epoch(OnPolicy(5), agent, one, carry, jr.key(7), 3)
        assert error is None and carry.learner.steps == 45
        states.append(carry.learner.agent)
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_chunks_count_all_their_steps():
    env = Chunked(PROBES["two-step"](3), 2, 2)
    agent = PPO(**SMALL)
    carry, metrics, _ = epoch(OnPolicy(4), agent, env, start(agent, env), jr.key(0), 1)
    assert carry.learner.steps == 24 and metrics["episodes"] == 12


def test_resume_is_exact(tmp_path: Path):
    """192 steps at once, or 96 and the rest: the same bits, on an environment written in JAX."""
    driver.train(RUN, tmp_path / "whole", quiet=True)
    driver.train(replace(RUN, steps=96), tmp_path / "parts", quiet=True)
    driver.resume(tmp_path / "parts", steps=192, quiet=True)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "whole/policy" / name).read_bytes() == (tmp_path / "parts/policy" / name).read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "kl" in row] == [64, 96, 128, 192]


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pendulum-like rows with action = half of the second number observed."""
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(600, 3)).astype(np.float32)
    end = np.arange(1, 601) % 50 == 0
    file = tmp_path_factory.mktemp("data") / "rows.npz"
    np.savez(
        file, observations=obs, actions=np.clip(0.5 * obs[:, 1:2], -1, 1), rewards=np.zeros(600, np.float32),
        terminals=np.zeros(600, bool), timeouts=end,
    )  # fmt: skip
    return file


@pytest.fixture(scope="module")
def imitated(demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bc") / "run"
    run = OfflineRun(
        data=str(demonstrations), env="jax:pendulum", agent=BC(POLICY, lr=3e-3, ema=0.9), steps=1500, batch_size=64,
        horizon=2, execute=2, eval_every=1500, eval_episodes=2, log_every=500, trackers=(),
    )  # fmt: skip
    driver.train(run, folder, quiet=True)
    return folder


def test_resume_of_imitation_is_exact(demonstrations: Path, tmp_path: Path):
    run = OfflineRun(
        data=str(demonstrations), agent=BC(POLICY), steps=200, batch_size=16, eval_every=100, log_every=100, trackers=()
    )
    driver.train(run, tmp_path / "whole", quiet=True)
    driver.train(replace(run, steps=100), tmp_path / "parts", quiet=True)
    driver.resume(tmp_path / "parts", steps=200, quiet=True)
    whole, parts = (tmp_path / name / "policy/model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_imitation(imitated: Path):
    policy = contraflow.load(imitated)
    assert policy.spec.horizon == 2 and policy.spec.action_dim == 2
    assert (policy.spec.low, policy.spec.high) == ((-1.0,), (1.0,))  # the range of the data
    obs = np.array([[0.0, 1.0, 0.0], [0.0, -1.0, 0.0]], np.float32)
    first = np.stack([policy(obs)[:, 0] for _ in range(20)])
    np.testing.assert_allclose(first.mean(0), [0.5, -0.5], atol=0.1)
    assert first.std(0).max() < 0.2


@pytest.mark.parametrize(
    "agent", [pytest.param(ReinFlow(steps=2, anchor=0.1, **SMALL), marks=pytest.mark.slow), FPO(**SMALL)]
)
def test_fine_tuning_starts_from_the_artefact(agent, imitated: Path, tmp_path: Path):
    """Before its first update the policy is the pretrained one; chunks and network come with it."""
    run = OnPolicyRun(
        env="jax:pendulum", agent=agent, pretrained=str(imitated), steps=64, num_envs=2, unroll=8, eval_every=64,
        eval_episodes=2, log_every=64, trackers=(),
    )  # fmt: skip
    resolve = run.resolve(False)
    assert resolve.horizon == 2 and resolve.execute == 2 and resolve.agent.policy == POLICY
    env, _ = resolve.environments(False)
    carry = driver.first_carry(resolve, tmp_path, env, jr.key(0), None)
    source = contraflow.load(imitated)
    obs, x0 = jnp.array([0.3, 0.8, -0.1]), jr.normal(jr.key(3), (2,))
    net = agent.network(carry.learner.agent)
    new = POLICY(net, x0, carry.learner.agent.stats(obs))
    np.testing.assert_allclose(new, POLICY(source.state.average, x0, source.state.stats(obs)), atol=1e-6)
    driver.train(run, tmp_path / "run", quiet=True)
    moved = contraflow.load(tmp_path / "run")
    assert moved.spec.horizon == 2
    assert not np.allclose(POLICY(agent.network(moved.state), x0, moved.state.stats(obs)), new)


def test_what_does_not_fit_is_refused(imitated: Path, demonstrations: Path, tmp_path: Path):
    out = tmp_path / "run"
    for run, message in (
        (replace(RUN, pretrained=str(imitated)), "PPO starts from scratch"),
        (replace(RUN, env="jax:cartpole-swingup", agent=FPO(**SMALL), pretrained=str(imitated)), "3 observations"),
        (replace(RUN, agent=FPO(**SMALL), pretrained=str(tmp_path / "nothing")), "holds no policy"),
        (replace(RUN, agent=DPPO(**SMALL), pretrained=str(imitated)), "learned must lie"),
        (OfflineRun(trackers=()), "--data"),
        (OfflineRun(data=str(demonstrations), env="jax:cartpole-swingup", trackers=()), "3 observations"),
        (OfflineRun(data=str(demonstrations), env="jax:pendulum", horizon=60, trackers=()), "horizon"),
    ):
        with pytest.raises(UserError, match=message):
            driver.train(run, out, quiet=True)
        assert not out.exists()


def test_an_average_velocity_comes_with_its_objective():
    assert BC(POLICY, objective=MeanFlow()).policy.averaged and not BC(POLICY).policy.averaged


@pytest.mark.slow
def test_dppo_starts_from_a_diffusion(demonstrations: Path, tmp_path: Path):
    diffusion = FlowPolicy(path=VP(), predict="noise", steps=5, clip=1.0, width=16, depth=1, embedding=8)
    run = OfflineRun(
        data=str(demonstrations), agent=BC(diffusion, lr=3e-3, ema=0.9), steps=800, batch_size=64, eval_every=800,
        log_every=400, trackers=(),
    )  # fmt: skip
    driver.train(run, tmp_path / "bc", quiet=True)
    policy = contraflow.load(tmp_path / "bc")
    first = np.stack([policy(np.array([[0.0, 1.0, 0.0]], np.float32))[0] for _ in range(20)])
    np.testing.assert_allclose(first.mean(), 0.5, atol=0.15)
    tuned = OnPolicyRun(
        env="jax:pendulum", agent=DPPO(learned=2, **SMALL), pretrained=str(tmp_path / "bc"), steps=32, num_envs=2,
        unroll=8, eval_every=32, eval_episodes=2, log_every=32, trackers=(),
    )  # fmt: skip
    driver.train(tuned, tmp_path / "dppo", quiet=True)
    with pytest.raises(UserError, match="no single flow"):
        driver.train(replace(tuned, pretrained=str(tmp_path / "dppo")), tmp_path / "again", quiet=True)


@pytest.mark.parametrize("name", ["obs-action", pytest.param("action", marks=pytest.mark.slow)])
def test_ppo_learns_the_probes(name: str):
    agent, env = PPO(width=16, depth=1, minibatches=4, epochs=8, actor_lr=3e-3, critic_lr=3e-3), PROBES[name](8)
    carry, _, _ = epoch(OnPolicy(32), agent, env, start(agent, env), jr.key(5), 40)
    returns = evaluate(agent, carry.learner.agent, PROBES[name](32), jr.key(6), 32)
    _, obs = env.reset(jr.key(9))
    best = np.mean([env.value(o, 0.99) for o in obs])
    assert returns.mean() > best - 0.15
