"""Handwritten digits of 8 x 8 pixels under their classes: the 1797 images of scikit-learn (extra `align`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from contraflow.core.types import UserError
from contraflow.envs.align.generation import Reward

NEAR = 0.99  # quantile of the distance to the nearest image within the data, up to which a sample is near them


@cache
def images() -> tuple[np.ndarray, np.ndarray]:
    """(images [n, 64] in [-1, 1], classes [n])."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError('align:digits needs scikit-learn: pip install "contraflow[align]"') from None
    x, y = map(np.asarray, load_digits(return_X_y=True))
    return (x / 8.0 - 1.0).astype(np.float32), y.astype(np.int32)


class Classifier(NamedTuple):
    """A network of one hidden layer of tanh units."""

    w1: Float[Array, "64 h"]
    b1: Float[Array, " h"]
    w2: Float[Array, "h 10"]
    b2: Float[Array, " 10"]

    def __call__(self, x: Float[Array, " 64"]) -> Float[Array, " 10"]:
        """Returns log-probabilities of the classes."""
        return jax.nn.log_softmax(jnp.tanh(x @ self.w1 + self.b1) @ self.w2 + self.b2)


@cache
def classifier(judge: bool) -> Classifier:
    """The one that rewards, trained on the even rows of the data, or the judge, wider and trained on the odd rows."""
    x, y = images()
    with jax.ensure_compile_time_eval():
        return _fit(jnp.asarray(x[judge::2]), jnp.asarray(y[judge::2]), 64 if judge else 32, jr.key(int(judge)))


def _fit(x: Float[Array, "n 64"], y: Int[Array, " n"], width: int, key: jax.Array) -> Classifier:
    """Adam for 500 steps on noisy images, with weight decay."""
    k1, k2, k_noise = jr.split(key, 3)
    start = Classifier(
        jr.normal(k1, (64, width)) / 8, jnp.zeros(width), jr.normal(k2, (width, 10)) / width**0.5, jnp.zeros(10)
    )
    tx = optax.adamw(1e-2, weight_decay=1e-2)

    def body(carry, key):
        net, opt = carry
        noisy = x + 0.2 * jr.normal(key, x.shape)
        loss = lambda net: -jnp.mean(jnp.take_along_axis(jax.vmap(net)(noisy), y[:, None], 1))
        updates, opt = tx.update(jax.grad(loss)(net), opt, net)
        return (optax.apply_updates(net, updates), opt), None

    return jax.jit(lambda: jax.lax.scan(body, (start, tx.init(start)), jr.split(k_noise, 500))[0][0])()


@cache
def reach() -> float:
    """Distance to the nearest other image that the quantile NEAR of the data has."""
    x, _ = images()
    squares = np.sum(x**2, 1)
    between = squares[:, None] + squares[None] - 2 * x @ x.T
    np.fill_diagonal(between, np.inf)
    return float(np.quantile(np.sqrt(np.maximum(between.min(1), 0.0)), NEAR))


def class_log_prob(x: Float[Array, " 64"], cond: Float[Array, " 10"]) -> jax.Array:
    """r = log p(class | image) of the small classifier."""
    return classifier(False)(x) @ cond


def ink(x: Float[Array, " 64"], cond: Float[Array, " 10"]) -> jax.Array:
    """r = mean brightness in [-1, 1]: has nothing to do with digits."""
    return jnp.mean(x)


@dataclass(frozen=True)
class Digits:
    """Images under one of ten classes, one-hot. The judge, another classifier, must find the class, and the image must
    lie as near to the data as 99 % of them do to each other."""

    sizes = (64, 10)
    shape = (8, 8)

    @property
    def rewards(self) -> Mapping[str, Reward]:
        return {"classifier": class_log_prob, "ink": ink}

    def condition(self, key):
        return jax.nn.one_hot(jr.randint(key, (), 0, 10), 10)

    def approved(self, x, cond):
        real = jnp.asarray(images()[0])
        near = jnp.min(jnp.sum(real**2, 1) - 2 * real @ x) + x @ x
        return (jnp.argmax(classifier(True)(x)) == jnp.argmax(cond)) & (near <= reach() ** 2)

    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """All images."""
        x, y = images()
        return np.eye(10, dtype=np.float32)[y], x
