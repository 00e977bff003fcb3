"""Learning over the start noise of a frozen policy: a reduction, a known optimum, and what a run leaves behind."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.agents.agent_helpers import Shift
from tests.train.loop_helpers import QUICK, begin, learner_of, run_epoch

from contraflow.agents.online.sac import SAC
from contraflow.core.optim import Optim
from contraflow.core.types import EnvSpec, UserError
from contraflow.data.samplers import Uniform
from contraflow.envs.bandit import Bandit
from contraflow.envs.chunk import Chunked
from contraflow.envs.control import Pendulum
from contraflow.envs.over_noise import OverNoise
from contraflow.flow.model import Ddpm, Flow, FlowSpec
from contraflow.nets.mlp import MLPSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.artifact import load_policy, save_policy
from contraflow.policy.flow import FlowPolicy
from contraflow.rl.critics import Critics
from contraflow.runtime.policy import load
from contraflow.training.frozen import Frozen
from contraflow.training.frozen import load as load_frozen
from contraflow.training.run import Run, resume, train
from contraflow.training.sources import Replay
from contraflow.training.sources.replay import Interact

NET = FlowSpec(clock=1.0, network=ResidualMLP(8, 1))
AGENT = SAC(
    target_entropy=-6.0, init_alpha=0.01, critic=Critics(width=32, depth=1, optim=Optim(3e-3)), actor=MLPSpec(16, 1),
    optim=Optim(3e-3), alpha_optim=Optim(3e-3),
)  # fmt: skip
TRUST = "tests.agents.agent_helpers,tests.train.test_over_noise"
C = (0.4, 0.9)


@dataclass(frozen=True)
class Bowl:
    """-8 |a - c|^2."""

    def __call__(self, action):
        return -8 * jnp.sum((action - jnp.array(C)) ** 2)


def bowl(num_envs: int, seed: int) -> Bandit:
    return Bandit(Bowl(), 2, num_envs)


def affine(folder: Path, spec: EnvSpec, m: float, s: float, net=NET) -> str:
    """The folder of the policy a = m + s w."""
    save_policy(folder, FlowPolicy(Flow(Shift(spec.action_dim, m, s), net)), spec, "")
    return str(folder)


def run(base: str | None, env: str, steps: int, agent=AGENT, **more) -> Run:
    source = Replay(env, 4, collect=16, updates=4, batch_size=32, buffer_size=4000, base=base, **more)
    return Run(agent, source, steps, eval_every=steps, eval_episodes=4, log_every=steps, trackers=())


def learned(env) -> Any:
    """The agent after 16 random steps and 24 with an update each, in four pendulums."""
    carry = begin(AGENT, env, jr.key(0))
    for stage, n in ((Interact(True, 0, 16, Uniform(0.99)), 4), (Interact(False, 1, 16, Uniform(0.99)), 24)):
        carry, _, _ = run_epoch(stage, AGENT, env, carry, jr.key(1), n)
    return learner_of(carry).agent


def test_over_the_noise_of_the_identity_it_is_the_agent_itself():
    """m = 0, s = 1 and noise in [-1, 1]: the same networks, bit for bit."""
    spec = EnvSpec(3, 1, 1, None, False)
    base = Frozen(FlowPolicy(Flow(Shift(1, 0.0, 1.0), NET)), spec, 1.0, False)
    jax.tree.map(np.testing.assert_array_equal, learned(Pendulum(4)), learned(OverNoise(Pendulum(4), base)))


def test_the_best_noise_of_an_affine_policy_is_found(tmp_path):
    """a = .1 + .3 w with w in [-1.5, 1.5] reaches [-.35, .55]: the best action is c there, and the end of the box for
    the coordinate where c lies beyond it."""
    base = affine(tmp_path / "base", EnvSpec(1, 2, 1, None, False), 0.1, 0.3)
    train(run(base, "tests.train.test_over_noise:bowl", 1600), tmp_path / "run", trust=TRUST, quiet=True)
    policy = load(tmp_path / "run", trust=TRUST)
    found = policy(np.zeros(1))
    np.testing.assert_allclose(found, [0.4, 0.55], atol=0.04)  # critics of 32 units
    explored = np.stack([policy(np.zeros(1), explore=True) for _ in range(20)])
    assert explored.max() <= 0.55 + 1e-6


SPEC = EnvSpec(3, 3, 1, None, False, horizon=3, execute=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A policy of chunks of 3 actions for the pendulum, of which 2 are carried out."""
    folder = tmp_path_factory.mktemp("base") / "base"
    save_policy(folder, FlowPolicy(NET.init(jr.key(1), 3, 3, 3)), SPEC, "jax:pendulum")
    return str(folder)


def test_the_folder_holds_the_whole_policy_and_goes_on(base, tmp_path):
    """The base bit for bit, its chunks, and its own actions for the chosen noise; another base is refused."""
    train(run(base, "jax:pendulum", 32, QUICK), tmp_path / "run", quiet=True)
    whole, found, env = load_policy(tmp_path / "run/policy")
    assert (found.horizon, found.execute, found.action_dim, env) == (3, 2, 3, "jax:pendulum")
    frozen = load_policy(Path(base))[0]
    jax.tree.map(np.testing.assert_array_equal, frozen, whole.base)
    obs = jnp.array([0.2, -0.9, 1.5])
    noise = 1.5 * whole.chooser(obs, jr.key(0))
    np.testing.assert_array_equal(whole(obs, jr.key(0)), frozen.from_noise(obs, noise))
    assert load(tmp_path / "run")(np.asarray(obs)).shape == (3, 1)
    assert resume(tmp_path / "run", steps=48, quiet=True).steps == 48
    save_policy(tmp_path / "other", FlowPolicy(NET.init(jr.key(2), 3, 3, 3)), SPEC, "jax:pendulum")
    moved = (tmp_path / "run/config.json").read_text().replace(base, str(tmp_path / "other"))
    (tmp_path / "run/config.json").write_text(moved)
    with pytest.raises(UserError, match=r"frozen policy of .* is not the one"):
        resume(tmp_path / "run", steps=64, quiet=True)


def test_one_noise_for_all_actions_of_a_chunk(base):
    frozen = load_frozen(Replay("jax:pendulum", base=base, noise_bound=0.5, noise_repeat=True), "")
    assert frozen is not None
    env = OverNoise(Chunked(Pendulum(2), 3, 2), frozen)
    assert (env.spec.action_dim, env.spec.horizon, env.spec.execute) == (1, 1, 2)
    obs, choice = env.reset(jr.key(0))[1], jnp.array([[0.3], [-1.0]])
    by_hand = jax.vmap(frozen.policy.from_noise)(obs, 0.5 * jnp.repeat(choice, 3, 1))
    np.testing.assert_allclose(frozen.decode(obs, choice), by_hand, rtol=1e-5)  # other batches round differently


def test_what_cannot_be_steered_is_refused(base, tmp_path):
    with pytest.raises(UserError, match="give --base"):
        train(run("", "jax:pendulum", 32), tmp_path / "a")
    with pytest.raises(UserError, match="was trained for 3 and 1"):
        train(run(base, "jax:cartpole-swingup", 32), tmp_path / "b")
    policy = AGENT.policy(AGENT.init(jr.key(0), EnvSpec(3, 1, 1, None, False)))
    save_policy(tmp_path / "gauss", policy, EnvSpec(3, 1, 1, None, False), "")
    noisy = affine(tmp_path / "noisy", SPEC, 0.0, 1.0, replace(NET, solver=Ddpm(3)))
    for name in (str(tmp_path / "gauss"), noisy):
        with pytest.raises(UserError, match="no function of its start noise"):
            train(run(name, "jax:pendulum", 32), tmp_path / "c", trust=TRUST)
    with pytest.raises(ValueError, match="noise-bound"):
        run(base, "jax:pendulum", 32, noise_bound=0.0)
