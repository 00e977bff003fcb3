"""Starting points of Markov chains for the posterior: endpoints of the policy.

x_t was made from an endpoint x1 of the policy. If the policy's distribution is pi, then x1 is a draw of the posterior
given x_t. It remains one under every Markov kernel that leaves the posterior invariant.
"""

import jax
from jaxtyping import Array, Int

from contraflow.core.types import PRNGKey
from contraflow.flow.path import AbstractPath, Scalar, Vector
from contraflow.flow.posterior.base import Candidates
from contraflow.flow.posterior.proposal import Support, systematic
from contraflow.flow.targets import log_normal


def pick_starts(
    key: PRNGKey, path: AbstractPath, x_t: Vector, t: Scalar, support: Support
) -> tuple[Candidates, Int[Array, " p"]]:
    """Returns the endpoints [P, d] and the indices [P] where chains start, in proportion to N(x_t; alpha u_i, beta^2).

    Raises ValueError if `support` is None.
    """
    if support is None:
        raise ValueError("chains start at the endpoint that was noised to x_t: pass support=[P, d] with it in row 0")
    likelihood = jax.nn.softmax(jax.vmap(lambda u: log_normal(x_t, path.alpha(t) * u, path.beta(t)))(support))
    return support, systematic(key, likelihood, support.shape[0])
