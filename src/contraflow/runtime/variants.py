"""A trained policy and its ablations, in the environment that it was trained for."""

from collections.abc import Iterator
from contextlib import contextmanager

from contraflow.core.bounds import check_fit
from contraflow.core.trust import Trust
from contraflow.envs import make
from contraflow.envs.base import Env
from contraflow.envs.chunk import chunked
from contraflow.policy import base
from contraflow.runtime.policy import Policy

OWN = "own"


def variants(policy: Policy) -> dict[str, base.Policy]:
    """Returns policies by rule: `own`, and the ablations of it (`contraflow.policy.base.ablations`)."""
    return {OWN: policy.network} | base.ablations(policy.network)


@contextmanager
def environment(
    policy: Policy, id: str, num_envs: int, seed: int, trust: Trust = "", render: bool = False
) -> Iterator[Env]:
    """Yields the environment `id` for the policy and closes it. Raises UserError if they do not fit."""
    env = chunked(make(id, num_envs, seed, trust=trust, render=render), policy.spec.horizon, policy.spec.execute)
    try:
        check_fit(policy.spec, env.spec, "the policy", id, policy.env)
        yield env
    finally:
        getattr(env, "close", lambda: None)()
