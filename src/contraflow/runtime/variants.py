"""A trained policy beside what is left of it without its parts, in the environment that it was made for."""

from collections.abc import Iterator
from contextlib import contextmanager

from contraflow.core.bounds import check_same_range
from contraflow.core.observation import shown
from contraflow.core.types import UserError
from contraflow.envs import make
from contraflow.envs.base import Env
from contraflow.envs.chunk import chunked
from contraflow.policy import base
from contraflow.runtime.policy import Policy

OWN = "own"


def variants(policy: Policy) -> dict[str, base.Policy]:
    """Policies by rule: `own`, and what is left without a part of it (`contraflow.policy.base.ablations`)."""
    return {OWN: policy.network} | base.ablations(policy.network)


@contextmanager
def environment(
    policy: Policy, id: str, num_envs: int, seed: int, trust: bool = False, render: bool = False
) -> Iterator[Env]:
    """The environment `id` for the policy, closed afterwards. Raises UserError when their sizes or ranges of
    actions differ."""
    env = chunked(make(id, num_envs, seed, trust=trust, render=render), policy.spec.horizon, policy.spec.execute)
    try:
        have, want = ((spec.observation, spec.action_dim) for spec in (env.spec, policy.spec))
        if have != want:
            raise UserError(
                f"{id} has {shown(have[0])} observations and {have[1] // policy.spec.horizon} actions, the policy was "
                f"trained for {shown(want[0])} and {want[1] // policy.spec.horizon}: choose an environment "
                f"like {policy.env}"
            )
        check_same_range(policy.spec, env.spec, "the policy", id)
        yield env
    finally:
        getattr(env, "close", lambda: None)()
