"""Flags of the first edition, and what they are called now: an old one gets one line that names the new one."""

from collections.abc import Collection

MOVED: dict[str, tuple[str, ...]] = {
    # optimisers
    "actor-lr": ("optim.lr", "ppo.actor-optim.lr"),
    "critic-lr": ("ppo.critic-optim.lr",),
    "alpha-lr": ("alpha-optim.lr",),
    "lr": ("optim.lr",),
    "decay-steps": ("optim.decay-steps", "ppo.actor-optim.decay-steps"),
    "max-grad-norm": ("optim.max-grad-norm", "ppo.actor-optim.max-grad-norm"),
    "critic.lr": ("critic.optim.lr",),
    "critic.decay-steps": ("critic.optim.decay-steps",),
    "critic.max-grad-norm": ("critic.optim.max-grad-norm",),
    # networks; `width` of an agent around PPO was that of its critic
    "width": ("ppo.critic.width", "flow.network.width", "actor.width"),
    "depth": ("ppo.critic.depth", "flow.network.depth", "actor.depth"),
    "embedding": ("flow.network.embedding",),
    "policy.width": ("flow.network.width",),
    "policy.depth": ("flow.network.depth",),
    "policy.embedding": ("flow.network.embedding",),
    "policy.steps": ("flow.solver.steps",),
    "policy": ("flow",),
    "log-std-min": ("log-std",),
    "log-std-max": ("log-std",),
    # the flow
    "path": ("flow.path",),
    "solver": ("flow.solver",),
    "predict": ("flow.predict",),
    "bounds": ("flow.support",),
    "t-min": ("flow.margin",),
    # what the flow is regressed on
    "estimator": ("target.estimator",),
    "endpoint": ("target.endpoint",),
    "query": ("target.query",),
    "base": ("target.jacobian-power",),
    # the choice among particles
    "explore": ("choose.explore",),
    "backup": ("choose.backup",),
    "greedy": ("choose.greedy",),
    "exploit": ("choose.greedy", "greedy"),
    "follow": ("tau",),
    # candidates of PMD
    "candidates": ("candidates.own",),
    "noise": ("candidates.noise",),
    "uniform": ("candidates.uniform",),
    "uniform-share": ("candidates.uniform-share",),
    "weight": ("candidates.weight",),
    # what all agents around PPO share
    "gamma": ("ppo.gamma",),
    "lam": ("ppo.lam",),
    "epochs": ("ppo.epochs",),
    "minibatches": ("ppo.minibatches",),
    "target-kl": ("ppo.target-kl",),
    "normalise-obs": ("ppo.normalise-obs",),
    "scale-reward": ("ppo.scale-reward",),
}
"""Settings of agents, without `--agent.`; what lies below them moved along. Which of several names depends on the
agent."""


def moved(path: str, known: Collection[str]) -> str | None:
    """The new name of an agent's setting, of those `known`, all without `agent.`; None if the old one is not ours."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        rest = parts[length:]
        for place in MOVED.get(".".join(parts[:length]), ()):
            if (new := ".".join([place, *rest])) in known:
                return new
    return None
