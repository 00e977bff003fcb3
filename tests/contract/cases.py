"""The agents of the contract battery, small: a new agent adds one line to `TABLE`."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr

from contraflow.agents.online.dacer import DACER
from contraflow.agents.online.pmd import PMD
from contraflow.agents.online.rfm import RFM
from contraflow.agents.online.sac import SAC
from contraflow.agents.online.sir import SIR
from contraflow.agents.online.td3 import TD3
from contraflow.core.types import EnvSpec, Transition
from contraflow.flow.fewstep import MeanFlow
from contraflow.flow.likelihood import Pushforward
from contraflow.flow.posterior.control import Fixed, MinVariance
from contraflow.flow.posterior.importance import Pooled, Reverse
from contraflow.flow.posterior.markov import Markov
from contraflow.flow.posterior.proposal import Mixture, Noise, Particles, UniformAction
from contraflow.flow.solver import Euler
from contraflow.nets.heads import Quantile
from contraflow.policy.select import Argmax, Softmax
from contraflow.rl.critics import Critics
from contraflow.rl.flow_policy import FlowPolicy
from contraflow.rl.temperature import Anneal, Constant, Tuned

SPEC = EnvSpec(3, 2, 4, 10, True)
B = 8
CRITIC = Critics(width=8, depth=1, lr=1e-2, tau=0.1)
SMALL = {"width": 8, "depth": 1, "critic": CRITIC}
PICKS = {"explore": Softmax(3), "backup": Softmax(3), "greedy": Argmax(3)}
FLOW = SMALL | PICKS | {"embedding": 4, "actor_lr": 1e-2, "solver": Euler(2), "temperature": Constant(0.02)}
POOL = Reverse(4, Noise(), Fixed(0.0)), Reverse(4, Particles(0.3), Fixed(0.0))

TABLE: dict[str, Any] = {
    "rfm": RFM(**FLOW),
    "rfm-paper": RFM(**FLOW, estimator=Reverse(8, Noise(), MinVariance()), condition_on_temperature=True),
    "rfm-gradient": RFM(
        **(FLOW | {"temperature": Anneal(0.5, 0.1, 10)}), estimator=Reverse(8, Noise(), Fixed(1.0)), endpoint="buffer"
    ),
    "rfm-particles": RFM(
        **FLOW,
        estimator=Reverse(8, Mixture((Noise(), UniformAction(), Particles(0.3)), (0.25, 0.25, 0.5)), Fixed(0.0)),
        behaviour=Constant(0.1),
    ),
    "rfm-one": RFM(
        **(FLOW | {"solver": Euler(1), "objective": MeanFlow(), "estimator": Pooled(POOL), "density": Pushforward()})
    ),
    "rfm-tuned": RFM(**(FLOW | {"backup": Softmax(4), "temperature": Tuned(rate=0.1), "estimator": Markov(4)})),
    "pmd": PMD(
        policy=FlowPolicy(steps=2, width=8, depth=1, embedding=4),
        candidates=4,
        uniform=2,
        actor_lr=1e-2,
        critic=CRITIC,
        **PICKS,
    ),
    "dacer": DACER(
        policy=FlowPolicy(steps=2, width=8, depth=1, embedding=4),
        draws=4,
        critic=replace(CRITIC, head=Quantile(5)),
        actor_lr=1e-2,
    ),
    "sac": SAC(**SMALL, actor_lr=1e-2),
    "td3": TD3(**SMALL, actor_lr=1e-2, delay=1),
    "sir": SIR(critic=CRITIC, **PICKS, base=0.5),
}
FAMILIES = ("rfm", "pmd", "sac", "sir")  # in the default tests; the others have nothing that these have not


def batch(key: jax.Array, n: int = B, reward: Any = None) -> Transition:
    k = jr.split(key, 6)
    return Transition(
        jr.normal(k[0], (n, 3)),
        jr.uniform(k[1], (n, 2), minval=-1.0, maxval=1.0),
        jr.normal(k[2], (n,)) if reward is None else reward,
        jr.normal(k[3], (n, 3)),
        jr.bernoulli(k[4], 0.3, (n,)),
        jr.bernoulli(k[5], 0.3, (n,)),
        jnp.ones(n, int),
    )


@dataclass(frozen=True, eq=False)
class Case:
    """An agent with its functions compiled once for all tests; `traces` counts how often Python ran them."""

    name: str
    agent: Any

    @cached_property
    def traces(self) -> dict[str, int]:
        return {"act": 0, "update": 0}

    @cached_property
    def init(self):
        return jax.jit(lambda key: self.agent.init(key, SPEC))

    @cached_property
    def update(self):
        def update(state, batch, key):
            self.traces["update"] += 1
            return self.agent.update(state, batch, key)

        return jax.jit(update, donate_argnums=0)

    @cached_property
    def act(self):
        def act(state, obs, key, explore):
            self.traces["act"] += 1
            return jax.vmap(lambda o, k: self.agent.act(state, o, k, explore))(obs, jr.split(key, obs.shape[0]))

        return jax.jit(act, static_argnums=3)

    def trained(self, seed: int, updates: int = 3):
        """(state, metrics) after a few updates; random from `seed` alone."""
        k_init, k_run = jr.split(jr.key(seed))
        state, metrics = self.init(k_init), {}
        for i in range(updates):
            k_batch, k_update = jr.split(jr.fold_in(k_run, i))
            state, metrics = self.update(state, batch(k_batch), k_update)
        return state, metrics
