"""The agents of the contract battery, small. A new agent is in it by itself, shrunk; what it is worth beside that has a
line in `TABLE`."""

import sys
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from contraflow.agents import needs, presets
from contraflow.agents.align.base import Scored
from contraflow.agents.offline.bc import BC
from contraflow.agents.offline.expo import EXPO
from contraflow.agents.online.dacer import DACER
from contraflow.agents.online.pmd import PMD, Candidates, Selection
from contraflow.agents.online.rfm import RFM, SMALL, Choice, PosteriorTarget
from contraflow.agents.online.sac import SAC
from contraflow.agents.online.sir import SIR
from contraflow.agents.online.td3 import TD3
from contraflow.agents.onpolicy.dppo import DIFFUSION, DPPO
from contraflow.agents.onpolicy.flow_ppo import FlowPPO
from contraflow.agents.onpolicy.fpo import FPO
from contraflow.agents.onpolicy.ppo import PPO
from contraflow.agents.onpolicy.reinflow import ReinFlow
from contraflow.core.optim import Optim
from contraflow.core.types import Batch, EnvSpec, Rollout
from contraflow.flow.fewstep import MeanFlow
from contraflow.flow.likelihood import Pushforward
from contraflow.flow.model import Ddim, FlowSpec
from contraflow.flow.plan import Plan
from contraflow.flow.posterior.control import Fixed, MinVariance
from contraflow.flow.posterior.importance import Pooled, Reverse
from contraflow.flow.posterior.markov import Markov
from contraflow.flow.posterior.proposal import Mixture, Noise, Particles, UniformAction
from contraflow.flow.solver import Euler
from contraflow.nets.heads import Quantile
from contraflow.nets.mlp import MLPSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.best_of import Argmax, Softmax
from contraflow.rl.critics import Critics
from contraflow.rl.edits import Edits
from contraflow.rl.ppo import PPOSettings
from contraflow.rl.temperature import Anneal, Constant, Tuned

sys.path.append(str(Path(__file__).parents[2] / "examples"))  # as a user's own agent is found
from custom_agent import CrossEntropy

SPEC = EnvSpec(3, 2, 4, 10, True)
B, T, N = 8, 3, 4
FAST = Optim(1e-2)
NET = ResidualMLP(8, 1, 4)
CRITIC = Critics(width=8, depth=1, tau=0.1, optim=Optim(1e-2, max_grad_norm=10.0))
PLAIN = {"critic": CRITIC, "actor": MLPSpec(8, 1), "optim": FAST}
LEARNED = {"critic": CRITIC, "optim": FAST}
PICKS = {"explore": Softmax(3), "backup": Softmax(3), "greedy": Argmax(3)}
FLOW = FlowSpec(solver=Ddim(2), network=NET)
LATENT = replace(SMALL, solver=Euler(2), network=NET)
POOL = Reverse(4, Noise(), Fixed(0.0)), Reverse(4, Particles(0.3), Fixed(0.0))
MIXED = Reverse(8, Mixture((Noise(), UniformAction(), Particles(0.3)), (0.25, 0.25, 0.5)), Fixed(0.0))
PASSES = PPOSettings(epochs=2, minibatches=2, critic=MLPSpec(8, 1), actor_optim=FAST, critic_optim=FAST)
RFM_ = RFM(flow=LATENT, choose=Choice(**PICKS), temperature=Constant(0.02), critic=CRITIC, optim=FAST)

TABLE: dict[str, Any] = {
    "rfm": RFM_,
    "rfm-paper": replace(
        RFM_, target=PosteriorTarget(Reverse(8, Noise(), MinVariance())), condition_on_temperature=True
    ),
    "rfm-gradient": replace(
        RFM_, target=PosteriorTarget(Reverse(8, Noise(), Fixed(1.0)), "buffer"), temperature=Anneal(0.5, 0.1, 10)
    ),
    "rfm-particles": replace(RFM_, target=PosteriorTarget(MIXED), normalise_obs="running"),
    "rfm-one": replace(
        RFM_, flow=replace(LATENT, solver=Ddim(1)), objective=MeanFlow(), target=PosteriorTarget(Pooled(POOL)),
        density=Pushforward(),
    ),
    "rfm-tuned": replace(
        RFM_, choose=Choice(**PICKS | {"backup": Softmax(4)}), temperature=Tuned(rate=0.1),
        target=PosteriorTarget(Markov(4)),
    ),
    "pmd": PMD(flow=FLOW, candidates=Candidates(own=4, uniform=2), choose=Selection(**PICKS), **LEARNED),
    "dacer": DACER(flow=FLOW, draws=4, **LEARNED | {"critic": replace(CRITIC, head=Quantile(5))}),
    "sac": SAC(**PLAIN),
    "td3": TD3(**PLAIN, delay=1),
    "sir": SIR(critic=CRITIC, **PICKS, kappa=0.5),
    "ppo": PPO(actor=MLPSpec(8, 1), ppo=replace(PASSES, normalise_obs="running")),
    "reinflow": ReinFlow(FLOW, steps=2, anchor=0.1, ppo=PASSES),
    "dppo": DPPO(replace(DIFFUSION, solver=Ddim(3), network=NET), learned=2, ppo=PASSES),
    "fpo": FPO(FLOW, pairs=2, ppo=PASSES),
    "flow-sde": FlowPPO(FLOW, Plan(2, window=1, place="random"), ppo=PASSES),
    "bc": BC(FLOW, optim=FAST),
    "expo": EXPO(FLOW, candidates=2, edit=Edits(net=MLPSpec(8, 1), optim=FAST), **LEARNED),
    "cross-entropy": CrossEntropy(rate=0.3),
}  # fmt: skip


def shrunk(settings: Any) -> Any:
    """The settings of an agent with the smallest networks and the fewest solver steps, wherever they stand."""
    small = {ResidualMLP: NET, MLPSpec: MLPSpec(8, 1), Ddim: Ddim(2), Optim: FAST}
    if type(settings) in small:
        return small[type(settings)]
    if not is_dataclass(settings):
        return settings
    parts = {f.name: shrunk(getattr(settings, f.name)) for f in fields(settings) if f.init}
    sizes = {}
    if isinstance(settings, Critics):
        sizes = {"width": 8, "depth": 1, "tau": 0.1, "members": min(settings.members, 2)}
    return replace(settings, **parts | sizes)


_covered = {type(agent) for agent in TABLE.values()}
TABLE |= {name: shrunk(p.agent) for name, p in presets().items() if type(p.agent) not in _covered}
FAMILIES = ("rfm", "sac", "sir", "reinflow", "bc", "cross-entropy")  # in the default tests, the rest are slow
FOREIGN = ("cross-entropy",)
DRAWS_NOTHING = ("iql",)  # an update is a function of its batch


def rng_of(key: jax.Array) -> np.random.Generator:
    """NumPy's generator for a key: what it draws compiles nothing."""
    return np.random.default_rng(np.asarray(jr.key_data(key)))


def batch(key: jax.Array, n: int = B, reward: Any = None) -> Batch:
    """Replayed rows; three in ten end their episode."""
    rng = rng_of(key)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    discount = jnp.asarray(np.where(rng.random(n) < 0.3, 0.0, 0.99), jnp.float32)
    return Batch(
        normal(n, 3), jnp.tanh(normal(n, 2)), normal(n) if reward is None else reward, discount, normal(n, 3),
        jnp.ones((n, 2)), jnp.tanh(normal(n, 2)), jnp.ones((n, 2)),
    )  # fmt: skip


def score(x: jax.Array, cond: jax.Array) -> jax.Array:
    """A reward with a gradient, for the methods of alignment that need one."""
    return x @ x


@dataclass(frozen=True, eq=False)
class Case:
    """An agent with its functions compiled once for all tests; `traces` counts how often Python ran them."""

    name: str
    agent: Any

    @property
    def onpolicy(self) -> bool:
        return needs(self.agent) == "rollout"

    @cached_property
    def traces(self) -> dict[str, int]:
        return {"act": 0, "update": 0}

    def init(self, key: jax.Array) -> Any:
        """Not compiled as a whole: the layers of all agents are."""
        return self.agent.init(key, SPEC)

    @cached_property
    def update(self):
        def update(state, data, key):
            self.traces["update"] += 1
            return self.agent.update(state, data, key)

        return jax.jit(update, donate_argnums=0)

    @cached_property
    def act(self):
        """Actions [n, a] of a policy at obs [n, o]."""

        def act(policy, obs, key, greedy):
            self.traces["act"] += 1
            return jax.vmap(lambda o, k: policy(o, k, greedy))(obs, jr.split(key, obs.shape[0]))

        return jax.jit(act, static_argnums=3)

    @cached_property
    def sample(self):
        """(actions, extras) [n, ...] of an on-policy agent's policy at obs [n, o]."""
        return jax.jit(lambda policy, obs, key: jax.vmap(policy.sample)(obs, jr.split(key, obs.shape[0])))

    @cached_property
    def explore(self):
        """Samples of an alignment method under conditions [n, c], in groups."""
        return jax.jit(self.agent.explore, static_argnums=2)

    def data(self, state: Any, key: jax.Array, scale: float | None = None) -> Batch | Rollout | Scored:
        """What the agent learns from in `state`; rewards are N(0, 1), or +-scale."""
        rng = rng_of(key)
        if needs(self.agent) == "conditions":
            leaves = getattr(self.agent, "leaves", 1)
            shape = 4, leaves * -(-6 // leaves)
            reward = rng.standard_normal(shape) if scale is None else scale * rng.choice([-1.0, 1.0], shape)
            cond = jnp.asarray(rng.standard_normal((4, 3)), jnp.float32)
            draws = self.explore(state, cond, shape[1], jr.fold_in(key, 1))
            return Scored(cond, draws, jnp.asarray(reward[..., None], jnp.float32), score=score)
        n = T * N if self.onpolicy else B
        reward = rng.standard_normal(n) if scale is None else scale * rng.choice([-1.0, 1.0], n)
        rows = batch(key, n, jnp.asarray(reward, jnp.float32))
        if not self.onpolicy:
            return rows
        extras = self.sample(self.agent.policy(state), rows.obs, key)[1]
        fold = lambda tree: jax.tree.map(lambda x: x.reshape(T, N, *x.shape[1:]), tree)
        flag = lambda share: jnp.asarray(rng.random((T, N)) < share)
        next_obs = fold(rows.next_obs)
        return Rollout(fold(rows.obs), fold(extras), fold(rows.reward), next_obs, flag(0.2), flag(0.2), flag(0.9))

    def trained(self, seed: int, updates: int = 3):
        """(state, metrics, data and keys of each update), random from `seed` alone."""
        k_init, k_run = jr.split(jr.key(seed))
        state, metrics, used = self.init(k_init), {}, []
        for i in range(updates):
            k_data, k_update = jr.split(jr.fold_in(k_run, i))
            data = self.data(state, k_data)
            used.append((data, jr.clone(k_update)))
            state, metrics = self.update(state, data, k_update)
        return state, metrics, used
