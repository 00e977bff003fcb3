"""On-policy and offline runs: bookkeeping, resume, pretrained policies, learning."""

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.train.loop_helpers import OnHost, begin, learner_of, run_epoch

import contraflow
from contraflow import Dataset, Rollouts, Run
from contraflow.agents.offline.bc import BC
from contraflow.agents.onpolicy.dppo import DPPO
from contraflow.agents.onpolicy.fpo import FPO
from contraflow.agents.onpolicy.ppo import PPO
from contraflow.agents.onpolicy.reinflow import ReinFlow
from contraflow.core.optim import Optim
from contraflow.core.types import UserError
from contraflow.envs.chunk import Chunked
from contraflow.envs.probe import PROBES
from contraflow.flow.model import Ddim, FlowSpec
from contraflow.flow.path import VP
from contraflow.nets.mlp import MLPSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.artifact import save_policy
from contraflow.policy.base import inner
from contraflow.rl.ppo import PPOSettings
from contraflow.training import run as driver
from contraflow.training.evaluate import evaluate
from contraflow.training.loop import of_seed
from contraflow.training.sources.rollouts import Unroll, decide

NET = MLPSpec(8, 1, "tanh")
SMALL = PPOSettings(epochs=2, minibatches=2, critic=NET)
GAUSSIAN = PPO(actor=NET, ppo=SMALL)
FLOW = FlowSpec(solver=Ddim(4), network=ResidualMLP(16, 1, 8))
RUN = Run(
    GAUSSIAN, Rollouts("jax:pendulum", num_envs=2, unroll=16), steps=192, eval_every=96, eval_episodes=2, log_every=64,
    trackers=(),
)  # fmt: skip


def test_the_update_sees_what_happened():
    """The rollout handed to the agent, replayed by hand: actions, successors, ends, and steps counted. An even number
    of steps, for 0, 1, 0, 1, 0 is the same read backwards."""
    seen = {}

    class Spy(PPO):
        def update(self, state, rollout, key):
            jax.debug.callback(lambda r: seen.update(rollout=r), rollout)
            return state, {"kl": jnp.zeros(())}

    agent, env = Spy(actor=NET, ppo=SMALL), PROBES["two-step"](3)
    carry = begin(agent, env, jr.key(0), 0)
    learner, env_state, obs = (of_seed(x, 0) for x in (carry.learner, carry.env, carry.obs))
    policy, rows = agent.policy(learner.agent), []
    for i in range(4):
        action, extras = decide(policy, obs, learner.iteration, i, jr.clone(jr.key(7)))
        env_state, step = env.step(env_state, action)
        rows.append((obs, extras.action, step.reward, step.next_obs, step.terminated))
        obs = step.obs
    carry, metrics, _ = run_epoch(Unroll(4), agent, env, begin(agent, env, jr.key(0), 0), jr.key(7), 1)
    jax.effects_barrier()
    r = seen["rollout"]
    columns = r.obs, r.extras.action, r.reward, r.next_obs, r.terminated
    for got, want in zip(columns, zip(*rows, strict=True), strict=True):
        np.testing.assert_allclose(got, np.stack(want), atol=1e-6)
    assert r.extras.action.shape == (4, 3, 1)
    learner = learner_of(carry)
    assert learner.steps == 12 and learner.iteration == 1 and metrics["episodes"] == 6


def test_a_host_environment_gives_the_same_rollout():
    agent, env = GAUSSIAN, PROBES["two-step"](3)
    states = []
    for one in (env, OnHost(env)):
        carry, _, error = run_epoch(Unroll(5), agent, one, begin(agent, one, jr.key(0), 0), jr.key(7), 3)
        assert error is None and learner_of(carry).steps == 45
        states.append(learner_of(carry).agent)
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_chunks_count_all_their_steps():
    env = Chunked(PROBES["two-step"](3), 2, 2, 0.99)
    carry, metrics, _ = run_epoch(Unroll(4), GAUSSIAN, env, begin(GAUSSIAN, env, jr.key(0), 0), jr.key(0), 1)
    assert learner_of(carry).steps == 24 and metrics["episodes"] == 12


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
    source = Dataset(str(demonstrations), "jax:pendulum", batch_size=64, horizon=2, execute=2)
    agent = BC(FLOW, ema=0.9, optim=Optim(3e-3, max_grad_norm=10.0))
    run = Run(agent, source, steps=1500, eval_every=1500, eval_episodes=2, log_every=500, trackers=())
    driver.train(run, folder, quiet=True)
    return folder


def test_resume_of_imitation_is_exact(demonstrations: Path, tmp_path: Path):
    source = Dataset(str(demonstrations), batch_size=16)
    run = Run(BC(FLOW), source, steps=200, eval_every=100, log_every=100, trackers=())
    driver.train(run, tmp_path / "whole", quiet=True)
    driver.train(replace(run, steps=100), tmp_path / "parts", quiet=True)
    driver.resume(tmp_path / "parts", steps=200, quiet=True)
    whole, parts = (tmp_path / name / "policy/model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_a_source_says_what_the_data_do_not(demonstrations: Path):
    """Bounds of actions: those that are given, the environment's, or else the range of the data and a note."""

    def opened(**more):
        run = Run(BC(FLOW), Dataset(str(demonstrations), **more), trackers=())
        with closing(run.source.open(run, "")) as found:
            return found.world.spec, found.data

    spec, data = opened(low=(-4.0,), high=(2.0,))
    assert (spec.low, spec.high, data.stated) == ((-4.0,), (2.0,), True)
    spec, data = opened(env="jax:pendulum", low=(-4.0,), high=(4.0,))
    assert (spec.low, spec.high) == ((-1.0,), (1.0,)) and "the range of jax:pendulum is taken" in data.notes[-1]
    spec, data = opened()
    assert not data.stated and "the range of the data became" in data.notes[-1]
    with pytest.raises(UserError, match=r"\(--low, --high\), or clip the actions \(--clip\)"):
        opened(low=(-0.5,), high=(0.5,))
    assert opened(low=(-0.5,), high=(0.5,), clip=True)[1].raw_action.max() == 0.5


def test_imitation(imitated: Path):
    policy = contraflow.load(imitated)
    assert policy.spec.horizon == 2 and policy.spec.action_dim == 2
    assert (policy.spec.low, policy.spec.high) == ((-1.0,), (1.0,))  # the range of the data
    obs = np.array([[0.0, 1.0, 0.0], [0.0, -1.0, 0.0]], np.float32)
    first = np.stack([policy(obs)[:, 0, 0] for _ in range(20)])
    np.testing.assert_allclose(first.mean(0), [0.5, -0.5], atol=0.1)
    assert first.std(0).max() < 0.2


@pytest.mark.parametrize(
    "agent", [pytest.param(ReinFlow(steps=2, anchor=0.1, ppo=SMALL), marks=pytest.mark.slow), FPO(ppo=SMALL)]
)
def test_fine_tuning_starts_from_the_artefact(agent, imitated: Path, tmp_path: Path):
    """Before its first update the policy is the pretrained one; chunks and network come with it."""
    run = Run(
        agent, Rollouts("jax:pendulum", num_envs=2, unroll=8), steps=64, pretrained=str(imitated), eval_every=64,
        eval_episodes=2, log_every=64, trackers=(),
    )  # fmt: skip
    settled = run.resolve("")
    assert (settled.source.horizon, settled.source.execute, settled.agent.flow) == (2, 2, FLOW)
    with closing(settled.source.open(settled, "")) as opened:
        carry = driver.first_carry(settled, tmp_path, opened, jr.key(0), None)
    source = contraflow.load(imitated).network
    obs, x0 = jnp.array([0.3, 0.8, -0.1]), jr.normal(jr.key(3), (2,))

    def end(policy):
        stats, flow = inner(policy, "stats"), inner(policy, "flow")
        return flow.sample(x0, stats(obs))

    new = end(settled.agent.policy(carry.learner.agent))
    np.testing.assert_allclose(new, end(source), atol=1e-6)
    driver.train(run, tmp_path / "run", quiet=True)
    moved = contraflow.load(tmp_path / "run")
    assert moved.spec.horizon == 2 and not np.allclose(end(moved.network), new)


class Wrapped(eqx.Module):
    """A part of a policy that is the user's own."""

    policy: Any

    def __call__(self, obs, key, greedy=True):
        return self.policy(obs, key, greedy)


def test_trust_reaches_the_pretrained_policy(imitated: Path, tmp_path: Path):
    """In all three places that read it: what is taken over, what must fit, and the first state."""
    source = contraflow.load(imitated)
    save_policy(tmp_path / "mine", Wrapped(source.network), source.spec, source.env)
    run = replace(RUN, agent=FPO(ppo=SMALL), pretrained=str(tmp_path / "mine"), steps=64)
    with pytest.raises(UserError, match=r"pass --trust [a-z_.]+"):
        driver.train(run, tmp_path / "run", quiet=True)
    assert driver.train(run, tmp_path / "run", trust="all", quiet=True).steps == run.total


def test_what_does_not_fit_is_refused(imitated: Path, demonstrations: Path, tmp_path: Path):
    out = tmp_path / "run"
    cartpole = Rollouts("jax:cartpole-swingup", num_envs=2, unroll=16)
    data = Dataset(str(demonstrations), "jax:pendulum", horizon=60)
    bc = Run(BC(), data, trackers=())
    for run, message in (
        (replace(RUN, pretrained=str(imitated)), "PPO starts from scratch"),
        (replace(RUN, source=cartpole, agent=FPO(ppo=SMALL), pretrained=str(imitated)), "was trained for 3 and 1"),
        (replace(RUN, agent=FPO(ppo=SMALL), pretrained=str(tmp_path / "nothing")), "holds no policy"),
        (replace(RUN, agent=DPPO(ppo=SMALL), pretrained=str(imitated)), "learned must lie"),
        (replace(bc, source=Dataset()), "--data"),
        (replace(bc, source=replace(data, env="jax:cartpole-swingup", horizon=1)), "3 observations"),
        (bc, "horizon"),
    ):
        with pytest.raises(UserError, match=message):
            driver.train(run, out, quiet=True)
        with pytest.raises(UserError, match=message):
            driver.train_seeds(run, (0, 1), out, quiet=True)
        assert not out.exists()


@pytest.mark.slow
def test_dppo_starts_from_a_diffusion(demonstrations: Path, tmp_path: Path):
    diffusion = replace(FLOW, path=VP(), predict="noise", solver=Ddim(5), clip=1.0)
    agent = BC(diffusion, ema=0.9, optim=Optim(3e-3, max_grad_norm=10.0))
    source = Dataset(str(demonstrations), batch_size=64)
    run = Run(agent, source, steps=800, eval_every=800, log_every=400, trackers=())
    driver.train(run, tmp_path / "bc", quiet=True)
    policy = contraflow.load(tmp_path / "bc")
    first = np.stack([policy(np.array([[0.0, 1.0, 0.0]], np.float32))[0] for _ in range(20)])
    np.testing.assert_allclose(first.mean(), 0.5, atol=0.15)
    tuned = Run(
        DPPO(learned=2, ppo=SMALL), Rollouts("jax:pendulum", num_envs=2, unroll=8), steps=32,
        pretrained=str(tmp_path / "bc"), eval_every=32, eval_episodes=2, log_every=32, trackers=(),
    )  # fmt: skip
    driver.train(tuned, tmp_path / "dppo", quiet=True)


@pytest.mark.parametrize("name", ["obs-action", pytest.param("action", marks=pytest.mark.slow)])
def test_ppo_learns_the_probes(name: str):
    optim, net = Optim(3e-3, max_grad_norm=0.5), MLPSpec(16, 1, "tanh")
    settings = PPOSettings(
        epochs=8, minibatches=4, critic=net, actor_optim=optim, critic_optim=optim, normalise_obs="running"
    )
    agent, env = PPO(actor=net, ppo=settings), PROBES[name](8)
    carry, _, _ = run_epoch(Unroll(32), agent, env, begin(agent, env, jr.key(0), 0), jr.key(5), 40)
    returns = evaluate(agent.policy(learner_of(carry).agent), PROBES[name](32), jr.key(6), 32)
    _, obs = env.reset(jr.key(9))
    best = np.mean([env.value(o, 0.99) for o in obs])
    assert returns.mean() > best - 0.15
