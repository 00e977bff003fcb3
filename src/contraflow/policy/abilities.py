"""What a policy can do besides acting, looked up through its wrappers."""

from typing import Any

from contraflow.policy.base import Noisy
from contraflow.policy.best_of import BestOf
from contraflow.policy.normalise import Normalised
from contraflow.policy.realtime import RealTime


def ability(policy: Any, obs: Any, name: str) -> tuple[Any, Any]:
    """Returns the method `name` of the policy and the observation as it takes it; (None, obs) if it has none.

    The method is looked up within normalisation, best of n and exploration noise, so an action from given noise is the
    one candidate that the flow maps it to. Other wrappers change actions, and what they wrap is not offered.
    """
    while not hasattr(policy, name):
        if isinstance(policy, Normalised):
            obs = None if obs is None else policy.stats(obs)
        elif not isinstance(policy, BestOf | Noisy | RealTime):
            return None, obs
        policy = policy.policy
    return getattr(policy, name), obs


def abilities(policy: Any) -> frozenset[str]:
    """Returns what the policy can do besides acting: "noise" (`from_noise`) and "rtc" (`resume`)."""
    pairs = (("noise", "from_noise"), ("rtc", "resume"))
    return frozenset(name for name, method in pairs if ability(policy, None, method)[0] is not None)
