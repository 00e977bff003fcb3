"""The frozen policy of a run over its start noise (`--base`): a folder, or the address of a served one."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from contraflow.core import bounds
from contraflow.core.trust import Trust
from contraflow.core.types import EnvSpec, UserError
from contraflow.envs.base import Env
from contraflow.envs.over_noise import OverNoise
from contraflow.flow.model import Ddpm
from contraflow.flow.solver import EulerMaruyama
from contraflow.policy.abilities import abilities
from contraflow.policy.artifact import load_policy, policy_folder, revision
from contraflow.policy.base import Policy, inner
from contraflow.policy.served import Served, connection, is_address, served
from contraflow.policy.start_noise import ByNoise, acted


@dataclass(frozen=True, eq=False)
class Frozen:
    """A policy that never changes, and the box [-bound, bound] of its start noise, the same for each action of a chunk
    with `repeat`."""

    policy: Policy
    spec: EnvSpec
    bound: float
    repeat: bool

    @property
    def size(self) -> int:
        return self.spec.action_dim // self.copies

    @property
    def copies(self) -> int:
        """How often a choice is repeated."""
        return self.spec.horizon if self.repeat else 1

    @property
    def compiled(self) -> bool:
        return not isinstance(self.policy, Served)

    @property
    def revision(self) -> str:
        """A digest of the weights."""
        return self.policy.revision if isinstance(self.policy, Served) else revision(self.policy)

    def steered(self, policy: Policy) -> ByNoise:
        return ByNoise(self.policy, policy, self.bound, self.copies)

    def decode(self, obs: Any, choice: Any) -> Any:
        base, noise = self.policy, jnp.tile(self.bound * choice, (1, self.copies))
        if not isinstance(base, Served):
            return _acted(base, obs, noise)
        rows = [jax.tree.map(lambda x, i=i: np.asarray(x[i]), obs) for i in range(len(noise))]
        return np.stack([base.ask(row, {"noise": x}) for row, x in zip(rows, np.asarray(noise), strict=True)])


@jax.jit
def _acted(policy: Policy, obs: Any, noise: Any) -> Any:
    return jax.vmap(partial(acted, policy))(obs, noise)


def load(source: Any, trust: Trust) -> Frozen | None:
    """Returns the frozen policy of a source; None for a source whose actions are its own.

    Raises UserError where the policy is missing, cannot start from given noise, or draws more noise on its way.
    """
    where = getattr(source, "base", None)
    if where is None:
        return None
    if not where:
        raise UserError("the frozen policy is missing: give --base, a folder or ws://host:port of a served one")
    policy, spec, _ = served(where) if is_address(where) else load_policy(policy_folder(Path(where)), trust)
    flow = inner(policy, "flow")
    takes = "noise" in (connection(where).metadata["supports"] if is_address(where) else abilities(policy))
    if not takes or (flow is not None and isinstance(flow.spec.solver, EulerMaruyama | Ddpm)):
        raise UserError(
            f"the policy in {where} is no function of its start noise: give a flow whose solver adds no noise, such as "
            "one of `contraflow train bc`"
        )
    return Frozen(policy, spec, source.noise_bound, source.noise_repeat)


def over_noise(env: Env, base: Frozen, source: Any) -> OverNoise:
    """Returns an environment over the noise of `base`. Raises UserError if they do not fit."""
    bounds.check_fit(base.spec, env.spec, f"the policy {source.base}", source.env)
    return OverNoise(env, base)


def settled(source: Any, trust: Trust) -> Any:
    """Returns the source with the chunks of its frozen policy, or the source itself without one."""
    base = load(source, trust)
    return source if base is None else replace(source, horizon=base.spec.horizon, execute=base.spec.execute)
