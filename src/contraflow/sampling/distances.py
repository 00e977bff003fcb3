"""Distances between two sets of samples x [n, d] and y [m, d]; each is near 0 if both have the same distribution.

Two finite sets of exact samples differ by the floor. A measured distance below the floor has no meaning.
"""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.core.types import PRNGKey, UserError
from contraflow.flow.targets import GaussianMixture

Points = Float[Array, "_ d"]
DISTANCES = ("sliced_wasserstein", "mmd2", "sinkhorn")
BANDWIDTHS = (0.25, 0.5, 1.0, 2.0)


@partial(jax.jit, static_argnames="projections")
def sliced_wasserstein(key: PRNGKey, x: Points, y: Points, projections: int = 256) -> Float[Array, ""]:
    """Returns sqrt(mean over unit directions e of W2^2(x.e, y.e)) [], with W2 in one dimension by sorting.

    For distributions that differ by a shift this is |shift| / sqrt d. Raises ValueError unless n = m.
    """
    if x.shape != y.shape:
        raise ValueError(f"sliced Wasserstein pairs sorted samples: shapes {x.shape} and {y.shape} must be equal")
    directions = jr.normal(key, (projections, x.shape[1]))
    directions = directions / jnp.linalg.norm(directions, axis=1, keepdims=True)
    return jnp.sqrt(jnp.mean((jnp.sort(x @ directions.T, axis=0) - jnp.sort(y @ directions.T, axis=0)) ** 2))


@jax.jit
def mmd2(x: Points, y: Points) -> Float[Array, ""]:
    """Returns the unbiased MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y) [], with x and x' different points.

    k(u, v) = mean over h in BANDWIDTHS of exp(-|u - v|^2 / (d h^2)), so that points of unit spread are equally similar
    in any dimension d. The result lies in [-2, 2] and can be negative.
    """

    unit = 0.5 * x.shape[1]

    def kernel(u, v):
        squared = jax.vmap(lambda p: jnp.sum(jax.vmap(jnp.subtract, (0, None))(v, p) ** 2, -1))(u)
        return sum(jnp.exp(-squared / (2.0 * unit * h**2)) for h in BANDWIDTHS) / len(BANDWIDTHS)

    def within(u):
        n = u.shape[0]
        return (jnp.sum(kernel(u, u)) - n) / (n * (n - 1))  # k(u, u) = 1 on the diagonal

    return within(x) + within(y) - 2.0 * jnp.mean(kernel(x, y))


@partial(jax.jit, static_argnames="epsilon")
def _sinkhorn(x: Points, y: Points, epsilon: float) -> Float[Array, ""]:
    from ott.tools.sinkhorn_divergence import sinkdiv

    return jnp.asarray(sinkdiv(x, y, epsilon=epsilon)[0])


def require_ott() -> None:
    """Raises UserError if ott-jax is not installed."""
    try:
        import ott  # noqa: F401
    except ImportError:
        raise UserError('Sinkhorn distances need ott-jax: pip install "contraflow[sample]"') from None


def sinkhorn(x: Points, y: Points, epsilon: float = 0.1) -> Float[Array, ""]:
    """Returns the Sinkhorn divergence OT_e(x, y) - OT_e(x, x) / 2 - OT_e(y, y) / 2 with cost |u - v|^2.

    It tends to W2^2 as epsilon -> 0. e = epsilon d / 2, because costs grow with the dimension. Raises UserError if
    ott-jax is not installed.
    """
    require_ott()
    with jax.numpy_rank_promotion("allow"):  # ott broadcasts
        return _sinkhorn(x, y, 0.5 * epsilon * x.shape[1])


def modes_found(x: Points, y: Points, modes: GaussianMixture) -> float:
    """Returns the share of `modes` with at least half as many points of x within 3 std as of the exact samples y."""

    def counts(points: Points) -> Float[Array, " m"]:
        near = lambda mean, std: jnp.sum(jnp.sum((points - mean[None]) ** 2, 1) < (3.0 * std) ** 2)
        return jax.vmap(near)(modes.means, modes.std) / points.shape[0]

    return float(jnp.mean(counts(x) >= 0.5 * counts(y)))


def distances(key: PRNGKey, x: Points, y: Points, sinkhorn_points: int = 1000) -> dict[str, float]:
    """Returns sliced Wasserstein, MMD^2 and, on the first `sinkhorn_points` because it is slow, Sinkhorn divergence.

    All are infinite if a sample is not finite, or beyond 1e6, where the flow has diverged.
    """
    if not bool(jnp.all(jnp.abs(x) < 1e6)):  # False for NaN
        return dict.fromkeys(DISTANCES, float("inf"))
    values = (sliced_wasserstein(key, x, y), mmd2(x, y), sinkhorn(x[:sinkhorn_points], y[:sinkhorn_points]))
    return dict(zip(DISTANCES, map(float, values), strict=True))
