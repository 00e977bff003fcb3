"""Quality of the regression targets of a posterior estimator."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.core.types import Obs, PRNGKey
from contraflow.flow.path import AbstractPath
from contraflow.flow.posterior.estimator import Estimator
from contraflow.flow.posterior.importance import Fixed, Reverse
from contraflow.flow.posterior.proposal import Mixture, Noise, UniformAction
from contraflow.flow.targets import LogDensity

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
REPEATS = 16
REFERENCE = Reverse(4096, Mixture((Noise(), UniformAction()), (0.5, 0.5)), Fixed(0.0))


def target_quality(
    estimator: Estimator,
    path: AbstractPath,
    log_pi: Callable[[Obs], LogDensity],
    obs: Obs,
    support: Float[Array, "B n a"],
    key: PRNGKey,
) -> dict[str, Float[Array, ""]]:
    """Returns means over observations [B, ...] of diagnostics at t in {.1, .3, .5, .7, .9}.

    `ess/t` and `eta/t` are those of the estimator. `target_bias/t` is the root mean square difference, in units of x1,
    between the mean target of 16 repeats and an estimate from 4096 candidates. `reference_ess/t` is the effective size
    of those candidates; if it is small, `target_bias` measures the error of the reference. `support` [B, n, a] holds
    endpoints of the policy, the first of which is noised.
    """
    k_x0, k_repeat, k_reference = jr.split(key, 3)
    n, x1 = support.shape[0], support[:, 0]
    x0 = jr.normal(k_x0, x1.shape)

    def at(t, obs, x0, x1, support, key_repeat, key_reference):
        x_t, density = path.perturb(x0, x1, t), log_pi(obs)
        post = jax.vmap(lambda k: estimator(k, path, density, x_t, t, support))(jr.split(key_repeat, REPEATS))
        exact = REFERENCE(key_reference, path, density, x_t, t)
        return post.ess.mean(), post.eta.mean(), jnp.mean((post.mean.mean(0) - exact.mean) ** 2), exact.ess

    def one_time(inputs):
        t, key_repeat, key_reference = inputs
        keys = jr.split(key_repeat, n), jr.split(key_reference, n)
        ess, eta, bias2, reference_ess = jax.vmap(at, (None, 0, 0, 0, 0, 0, 0))(t, obs, x0, x1, support, *keys)
        return ess.mean(), eta.mean(), jnp.sqrt(bias2.mean()), reference_ess.mean()

    count = len(TIMES)
    results = jax.lax.map(one_time, (jnp.array(TIMES), jr.split(k_repeat, count), jr.split(k_reference, count)))
    names = "ess", "eta", "target_bias", "reference_ess"
    return {f"{name}/{t}": values[i] for name, values in zip(names, results, strict=True) for i, t in enumerate(TIMES)}


def value_gap(
    value: Callable[[Obs, Float[Array, " a"]], Float[Array, ""]],
    lam: Float[Array, ""],
    obs: Obs,
    action_dim: int,
    key: PRNGKey,
) -> Float[Array, ""]:
    """Returns the mean over observations of (max Q - min Q) / lambda over 64 uniform actions [action_dim]."""
    actions = jr.uniform(key, (64, action_dim), minval=-1.0, maxval=1.0)
    q = jax.vmap(lambda o: jax.vmap(lambda a: value(o, a))(actions))(obs)
    return jnp.mean(q.max(1) - q.min(1)) / lam
