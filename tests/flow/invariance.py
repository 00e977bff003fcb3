"""Whether an estimator is unbiased where the policy is right."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr

from contraflow.flow.path import Linear


@partial(jax.jit, static_argnums=(0, 3, 5))
def residuals(estimator, target, key, n, t, endpoints=1):
    """(m - x1) times the features 1, x_t, tanh 3 x_t of n joint draws (x1, x_t), in standard errors.

    x1 is a draw of the posterior given x_t, so that an unbiased m has E[(m - x1) f(x_t)] = 0 for every f. All but the
    first of the `endpoints` know nothing of x_t.
    """
    k_x1, k_x0, k_m = jr.split(key, 3)
    support = target.sample(k_x1, n * endpoints).reshape(n, endpoints, -1)
    x1 = support[:, 0]
    x_t = jax.vmap(Linear().perturb, (0, 0, None))(jr.normal(k_x0, x1.shape), x1, t)
    mean = jax.vmap(lambda k, x, u: estimator(k, Linear(), target, x, t, u).mean)(jr.split(k_m, n), x_t, support)
    products = (mean - x1)[None] * jnp.stack([jnp.ones_like(x_t), x_t, jnp.tanh(3 * x_t)])
    return jnp.abs(products.mean(1) / (products.std(1) / jnp.sqrt(n)))
