"""A Markov step that crosses between modes, however little probability lies between them."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool

from contraflow.core.checks import check_count
from contraflow.core.types import PRNGKey
from contraflow.flow.path import Vector
from contraflow.flow.support import Box, Tanh
from contraflow.flow.targets import LogDensity, log_normal

LONGEST, SHORTEST = 0.6, 0.05  # step lengths of a climb, per coordinate
WIDTHS = (0.03, 0.1, 0.3)  # of the kernels, in units of u; several, because the widths of the modes are unknown
UNIFORM = 0.1  # share of uniform actions among the candidates, which gives every start a density


@dataclass(frozen=True)
class ModeJump:
    """Iterated sampling importance resampling with a proposal around modes found by climbing from random actions.

    `centres` uniform actions climb log pi in `climbs` gradient steps, with lengths that shrink from .6 to .05 per
    coordinate. They become the centres of a proposal q: .9 of a kernel density with three widths and .1 of uniform
    actions. The start competes with `samples` candidates of q, and one is picked with probability ~ pi(u) / q(u).

    The centres do not depend on the start, so the step leaves pi invariant wherever the climbs end: a start drawn from
    pi remains a draw of pi. Any other start is moved towards pi, and barriers between modes do not slow it down.

    The step is applied to endpoints of a policy before they are noised to x_t. A mode that the policy lacks then gets
    query points along its whole path, which one step of the posterior at a given x_t could not provide. Each endpoint
    costs centres x climbs gradients of the critic and samples + 1 values. `share` is the fraction of a batch that takes
    the step.

    Resampling: Samsonov et al., 2111.02702. The proposal is ours.

    Raises ValueError for a share outside (0, 1], or centres, climbs or samples < 1.
    """

    share: float = 0.125
    centres: int = 4
    climbs: int = 8
    samples: int = 16

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ValueError(f"ModeJump: share is a fraction of the batch and must lie in (0, 1], got {self.share}")
        check_count(self, 1, "centres", "climbs", "samples")

    def __call__(
        self, key: PRNGKey, log_pi: LogDensity, u: Vector, support: Tanh | Box = Tanh()
    ) -> tuple[Vector, Bool[Array, ""]]:
        """Returns the next latent [d] from u [d] and whether it moved; log pi is evaluated only within the support."""
        k_climb, k_of, k_width, k_noise, k_either, k_uniform, k_pick = jr.split(key, 7)
        d, n, widths = u.shape[0], self.samples, jnp.asarray(WIDTHS)
        within = support.action if isinstance(support, Box) else lambda u: u

        def climb(places, length):
            slopes = jax.vmap(jax.grad(log_pi))(places)
            norms = jnp.sqrt(jnp.sum(slopes**2, axis=1, keepdims=True) / d)
            return within(places + length * slopes / jnp.maximum(norms, jnp.finfo(slopes.dtype).tiny)), None

        lengths = jnp.geomspace(LONGEST, SHORTEST, self.climbs)
        centres, _ = jax.lax.scan(climb, support.uniform(k_climb, self.centres, d), lengths)

        of, width = jr.randint(k_of, (n,), 0, self.centres), widths[jr.randint(k_width, (n, 1), 0, len(WIDTHS))]
        near = centres[of] + width * jr.normal(k_noise, (n, d))
        candidates = jnp.where(jr.bernoulli(k_either, UNIFORM, (n, 1)), support.uniform(k_uniform, n, d), near)

        def log_q(u):
            kernels = jax.vmap(lambda c: jax.vmap(lambda s: log_normal(u, c, s))(widths))(centres)
            everywhere = support.log_det(u) - d * jnp.log(2.0)
            around = jax.nn.logsumexp(kernels) - jnp.log(kernels.size)
            return jnp.logaddexp(jnp.log1p(-UNIFORM) + around, jnp.log(UNIFORM) + everywhere)

        def log_weight(u):
            return jnp.where(support.holds(u), log_pi(u) - log_q(u), -jnp.inf)

        states = jnp.concatenate([within(u)[None], candidates])  # a policy in training may leave the box
        picked = jr.categorical(k_pick, jax.vmap(log_weight)(states))
        return states[picked], picked > 0
