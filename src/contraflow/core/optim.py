"""One gradient step."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import optax
from jaxtyping import Array, Float, PyTree


def clipped_adam(
    learning_rate: float, max_grad_norm: float | None, decay_steps: int | None = None
) -> optax.GradientTransformation:
    """Adam after clipping the global gradient norm (None leaves it unclipped).

    The rate falls to a tenth along a cosine over `decay_steps` updates and stays there; None keeps it constant.
    """
    clip = optax.identity() if max_grad_norm is None else optax.clip_by_global_norm(max_grad_norm)
    rate = learning_rate if decay_steps is None else optax.cosine_decay_schedule(learning_rate, decay_steps, alpha=0.1)
    return optax.chain(clip, optax.adam(rate))


def check_positive(settings: Any, *names: str) -> None:
    """Refuse settings of which a field is not above 0, with one message that names it."""
    for name in names:
        if not getattr(settings, name) > 0:
            raise ValueError(f"{name} must be positive, got {getattr(settings, name)}")


def start(tx: optax.GradientTransformation, net: Any) -> PyTree:
    """The first optimiser state for the module `net`."""
    return tx.init(net)


def gradient_step(
    tx: optax.GradientTransformation, loss_fn: Callable[[Any], Float[Array, ""]], net: Any, opt_state: PyTree
) -> tuple[Any, PyTree, Float[Array, ""], Float[Array, ""]]:
    """(net, opt_state, loss, gradient norm before clipping) after one step on loss_fn(net)."""
    loss, grad = jax.value_and_grad(loss_fn)(net)
    updates, opt_state = tx.update(grad, opt_state, net)
    return eqx.apply_updates(net, updates), opt_state, loss, optax.tree.norm(grad)
