"""What one greedy action of an agent costs: the numbers that belong beside its return."""

from dataclasses import dataclass
from typing import Any

from contraflow.agents.online.dacer import DACER
from contraflow.agents.online.pmd import PMD
from contraflow.agents.online.rfm import RFM
from contraflow.agents.online.sac import SAC
from contraflow.agents.online.sir import SIR
from contraflow.agents.online.td3 import TD3
from contraflow.policy.select import chooses


@dataclass(frozen=True)
class Cost:
    """`particles` candidates, of which one is taken; `nfe` evaluations of the actor for each; `critic_calls` in all."""

    particles: int
    nfe: int
    critic_calls: int


def acting_cost(agent: Any) -> Cost | None:
    """The cost of one action of the evaluation rule; None for an agent that is not ours."""
    if isinstance(agent, RFM):
        n = agent.greedy.particles
        return Cost(n, agent.solver.nfe, n if chooses(agent.greedy) else 0)
    if isinstance(agent, SIR):
        return Cost(agent.greedy.particles, 0, agent.greedy.particles)
    if isinstance(agent, PMD):
        n = agent.greedy.particles
        return Cost(n, agent.policy.steps, n if chooses(agent.greedy) else 0)
    if isinstance(agent, DACER):
        return Cost(1, agent.policy.steps, 0)
    return Cost(1, 1, 0) if isinstance(agent, SAC | TD3) else None
