"""Optimisers: settings, and one gradient step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import optax
from jaxtyping import Array, Float, PyTree


@dataclass(frozen=True)
class Optim:
    """Settings of Adam. Raises ValueError for a rate, norm or number of updates that is not positive."""

    lr: float = 3e-4
    decay_steps: int | None = None
    """Updates over which the rate falls to a tenth along a cosine; None keeps it constant."""
    max_grad_norm: float | None = None
    """Gradients are clipped to this global norm; None does not clip."""

    def __post_init__(self):
        check_positive(self, "lr")
        for name in ("decay_steps", "max_grad_norm"):
            if getattr(self, name) is not None:
                check_positive(self, name)

    @property
    def tx(self) -> optax.GradientTransformation:
        """The optax transformation: clipping if `max_grad_norm` is set, then Adam."""
        clip = optax.identity() if self.max_grad_norm is None else optax.clip_by_global_norm(self.max_grad_norm)
        steps = self.decay_steps
        rate = self.lr if steps is None else optax.cosine_decay_schedule(self.lr, steps, alpha=0.1)
        return optax.chain(clip, optax.adam(rate))

    def init(self, net: Any) -> PyTree:
        """Returns the initial optimiser state for the parameters of `net`."""
        return self.tx.init(net)


def check_positive(settings: Any, *names: str) -> None:
    """Raises ValueError naming the first field that is not positive, or not whole where its type is int."""
    for name in names:
        value = getattr(settings, name)
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
        if settings.__dataclass_fields__[name].type in (int, "int") and type(value) is not int:
            raise ValueError(f"{name} must be a whole number, got {value}")


def gradient_step(
    tx: optax.GradientTransformation, loss_fn: Callable[[Any], Float[Array, ""]], net: Any, opt_state: PyTree
) -> tuple[Any, PyTree, Float[Array, ""], Float[Array, ""]]:
    """Returns (net, opt_state, loss, gradient norm before clipping) after one step on loss_fn(net)."""
    loss, grad = jax.value_and_grad(loss_fn)(net)
    updates, opt_state = tx.update(grad, opt_state, net)
    return eqx.apply_updates(net, updates), opt_state, loss, optax.tree.norm(grad)
