"""A policy adapted to changed sensors from unlabelled observations (KL guided domain adaptation, 2106.07780).

Two domains have the same task and other observations. An encoder maps those of the target to a representation whose
distribution is that of the source, by the relative entropy between them. Both distributions are the mixtures of what a
batch is encoded to, p(z) = mean_i N(z; m_i, s^2):

    KL(p_T | p_S) ~ mean_j [log p_T(z_j) - log p_S(z_j)],   z_j ~ N(m_j^T, s^2).

The paper puts all components into both mixtures. But z_j was drawn from component j, which is in the first one alone,
so the estimate is positive for equal domains: by 37 nats in 64 dimensions. Leaving component j out of the first mixture
removes this.

The paper trains one network on both domains, with labels of the source. Here the policy is already trained and stays as
it is. The encoder is an affine map in front of it, the source is represented by its own observations, and no labels are
needed. Only what the distributions show can be found: the target's observations must come from the same behaviour.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float

from contraflow.core.types import PRNGKey, UserError
from contraflow.policy.base import Cost, Policy

Points = Float[Array, "n d"]
Others = Float[Array, "m d"]
Scalar = Float[Array, ""]


def mixture_kl(p: Points, q: Others, std: float | Scalar, key: PRNGKey, leave_one_out: bool = True) -> Scalar:
    """Returns the estimate of KL(p | q) between the mixtures of N(p_i, std^2 I) and of N(q_i, std^2 I), in nats.

    One point is drawn from each component of p. `leave_one_out=False` is the released estimate, with its bias.
    """
    z = p + std * jr.normal(key, p.shape)
    n = p.shape[0]
    own = jnp.where(jnp.eye(n, dtype=bool), -jnp.inf, 0.0) if leave_one_out else jnp.zeros((n, n))
    log_p = jax.nn.logsumexp(_exponents(z, p, std) + own, 1) - jnp.log(n - leave_one_out)
    log_q = jax.nn.logsumexp(_exponents(z, q, std), 1) - jnp.log(q.shape[0])
    return jnp.mean(log_p - log_q)


def _exponents(z: Points, centres: Others, std: float | Scalar) -> Float[Array, "n m"]:
    return -0.5 * jnp.sum((z[:, None] - centres[None]) ** 2, -1) / std**2


class Adapted(eqx.Module):
    """A policy behind an affine map of its observations, o + std (A n + b) with n = (o - mean) / std."""

    policy: Any
    mean: Float[Array, " o"]
    std: Float[Array, " o"]
    slope: Float[Array, "o o"]
    shift: Float[Array, " o"]

    def encode(self, obs: Float[Array, " o"]) -> Float[Array, " o"]:
        """Returns the observation as the source's sensors would have shown it."""
        return obs + self.std * (self.slope @ ((obs - self.mean) / self.std) + self.shift)

    def __call__(self, obs: Float[Array, " o"], key: PRNGKey, greedy: bool = True) -> Float[Array, " a"]:
        return self.policy(self.encode(obs), key, greedy)

    @property
    def cost(self) -> Cost:
        return self.policy.cost


def adapted(
    policy: Policy,
    source: Float[Array, "n o"],
    target: Float[Array, "m p"],
    key: PRNGKey,
    width: float = 0.2,
    steps: int = 2000,
    batch: int = 256,
    rate: float = 1e-2,
    leave_one_out: bool = True,
) -> Adapted:
    """Returns the policy behind a map from observations of the target [n, o] to those like the source's [m, o].

    The map starts as the identity, or as that of an adapted policy. Adam descends KL(p_T | p_S) + KL(p_S | p_T) of
    batches. `width` is the deviation of the mixtures, in deviations of the source's observations.

    Raises UserError for observations of other sizes, or fewer than two.
    """
    if source.ndim != 2 or source.shape[1:] != target.shape[1:] or min(len(source), len(target)) < 2:
        raise UserError(f"source and target need the same numbers per row, got {source.shape} and {target.shape}")
    mean, std, d = source.mean(0), source.std(0) + 1e-6, source.shape[1]
    start = policy if isinstance(policy, Adapted) else Adapted(policy, mean, std, jnp.zeros((d, d)), jnp.zeros(d))
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps, 0.01))

    def loss(map, key):
        k_source, k_target, k_there, k_back = jr.split(key, 4)
        real = (source[jr.randint(k_source, (batch,), 0, len(source))] - mean[None]) / std[None]
        seen = jax.vmap(_placed(start, map).encode)(target[jr.randint(k_target, (batch,), 0, len(target))])
        seen = (seen - mean[None]) / std[None]
        there = mixture_kl(seen, real, width, k_there, leave_one_out)
        return there + mixture_kl(real, seen, width, k_back, leave_one_out)

    def body(carry, key):
        map, opt = carry
        updates, opt = tx.update(jax.grad(loss)(map, key), opt, map)
        return (optax.apply_updates(map, updates), opt), None

    map = start.slope, start.shift
    fit = jax.jit(lambda map: jax.lax.scan(body, (map, tx.init(map)), jr.split(key, steps))[0][0])
    return _placed(start, fit(map))


def _placed(start: Adapted, map: Any) -> Adapted:
    return eqx.tree_at(lambda a: (a.slope, a.shift), start, map)
