"""A Gaussian edit of given actions, learned as SAC learns its actor; shared by QAM-E and EXPO."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PyTree

from contraflow.core.optim import Optim, check_positive, gradient_step
from contraflow.core.types import EnvSpec, Metrics, Obs, PRNGKey
from contraflow.nets.mlp import MLPSpec
from contraflow.policy.edit import Edit

HIGHEST = 0.6836
"""Largest entropy of tanh(u), u ~ N(0, std^2), in nats, reached at the std .874."""


class EditState(eqx.Module):
    edit: Edit
    log_alpha: Float[Array, ""]
    opt: PyTree
    alpha_opt: PyTree


@dataclass(frozen=True)
class Edits:
    """Settings of edits a + scale tanh(u) (1812.05905; 2507.07986).

    They minimise E[alpha log pi(tanh u) - Q(s, clip(a + scale tanh u))] with alpha tuned to an entropy. Raises
    ValueError for an entropy that no edit can have.
    """

    scale: float = 0.1
    """Largest change of a coordinate of an action in [-1, 1]."""
    entropy: float = -0.5
    """Target, in nats per coordinate."""
    unit: Literal["edit", "action"] = "edit"
    """Unit of the density: the edit over its scale, or the action, which adds log `scale` to the entropy (as
    published; out of reach for -.5 and scales up to .306)."""
    init_alpha: float = 1.0
    net: MLPSpec = MLPSpec(256, 3)
    optim: Optim = Optim(3e-4)
    alpha_optim: Optim = Optim(3e-4)

    def __post_init__(self):
        check_positive(self, "scale", "init_alpha")
        if not self.target < HIGHEST:
            raise ValueError(
                f"edits of scale {self.scale} cannot have an entropy of {self.entropy} per number, the highest is "
                f"{HIGHEST + self.entropy - self.target:.3f}: lower `entropy`, or count in the unit 'edit'"
            )

    @property
    def target(self) -> float:
        """The target entropy of tanh(u), per coordinate."""
        return self.entropy - (math.log(self.scale) if self.unit == "action" else 0.0)

    def init(self, key: PRNGKey, spec: EnvSpec) -> EditState:
        """Returns a fresh network of (s, a)."""
        edit = Edit(self.net.init(key, spec.observation, 2 * spec.action_dim, more=spec.action_dim), self.scale)
        log_alpha = jnp.log(jnp.asarray(self.init_alpha, jnp.float32))
        return EditState(edit, log_alpha, self.optim.init(edit), self.alpha_optim.init(log_alpha))

    def learn(
        self,
        state: EditState,
        value: Callable[[Obs, Float[Array, " a"]], Float[Array, ""]],
        obs: Obs,
        action: Float[Array, "B a"],
        key: PRNGKey,
    ) -> tuple[EditState, Metrics]:
        """Makes one step up value(s, edited action) and one of alpha. The actions [B, a] are held fixed."""
        keys, alpha = jr.split(key, action.shape[0]), jnp.exp(state.log_alpha)

        def loss_fn(edit):
            """Returns (loss, entropy per coordinate)."""

            def one(obs, action, key):
                edited, log_prob = edit.draw(obs, action, key)
                return alpha * log_prob - value(obs, edited), log_prob

            losses, log_prob = jax.vmap(one)(obs, jax.lax.stop_gradient(action), keys)
            return losses.mean(), -log_prob.mean() / action.shape[-1]

        (loss, entropy), grad = jax.value_and_grad(loss_fn, has_aux=True)(state.edit)
        updates, opt = self.optim.tx.update(grad, state.opt, state.edit)  # pyright: ignore[reportArgumentType]
        log_alpha, alpha_opt, _, _ = gradient_step(
            self.alpha_optim.tx, lambda x: x * (entropy - self.target), state.log_alpha, state.alpha_opt
        )
        metrics = {"edit_loss": loss, "entropy": entropy, "temperature": alpha}
        return EditState(eqx.apply_updates(state.edit, updates), log_alpha, opt, alpha_opt), metrics
