"""What a run looks like from inside: effective sample size and bias of the regression target by time, action law."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.agents.base import Agent
from contraflow.agents.online.rfm import RFM
from contraflow.core.types import PRNGKey
from contraflow.flow.posterior.control import Fixed
from contraflow.flow.posterior.importance import Reverse
from contraflow.flow.posterior.proposal import Mixture, Noise, UniformAction
from contraflow.rl.normalise import seen

BINS = 16  # of the action histogram
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
STATES = 16
REPEATS = 16
REFERENCE = Reverse(4096, Mixture((Noise(), UniformAction()), (0.5, 0.5)), Fixed(0.0))


def diagnose(agent: Agent, state: Any, obs: Any, key: PRNGKey) -> dict[str, float]:
    """Diagnostics on the first 16 of the observations [B, o], as plain numbers.

    For every agent: `action_mean`, `action_std`, `saturated` (P(|a| > .95)) and `action_entropy` (per dimension, from a
    32-bin histogram, in nats; log 2 = .69 is uniform), `action_share/i` (of actions of all dimensions in the i-th of 16
    bins over [-1, 1]). For RFM also, for t in {.1, .3, .5, .7, .9}: `ess/t`, `eta/t`,
    `target_bias/t` (root mean square of the mean target over 16 repeats against 4096 candidates, in units of x1),
    `reference_ess/t` (how many of the 4096 count: with few of them `target_bias` is an error of the reference) and
    `q_gap`, the spread of Q over uniform actions divided by lambda.
    """
    obs = jnp.asarray(obs)[:STATES]
    out = _action_law(agent, state, obs, jr.fold_in(key, 0))
    if isinstance(agent, RFM):
        out |= _target_quality(agent, state, obs, jr.fold_in(key, 1))
    return {f"diagnostics/{name}": float(value) for name, value in jax.device_get(out).items()}


@partial(jax.jit, static_argnames=("agent",))
def _action_law(agent: Agent, state: Any, obs: Float[Array, "B o"], key: PRNGKey) -> dict[str, Float[Array, ""]]:
    keys = jr.split(key, (obs.shape[0], 128))
    actions = jax.vmap(lambda o, ks: jax.vmap(lambda k: agent.act(state, o, k, True))(ks))(obs, keys)
    width = 2.0 / 32
    bins = jnp.clip(jnp.floor((actions + 1.0) / width), 0, 31).astype(jnp.int32)
    share = jnp.mean(jax.nn.one_hot(bins, 32), axis=1)  # [B, a, 32]
    entropy = -jnp.sum(share * jnp.log(jnp.maximum(share, 1e-12) / width), axis=-1)
    histogram = share.mean((0, 1)).reshape(BINS, -1).sum(1)
    return {
        "action_mean": actions.mean(),
        "action_std": jnp.std(actions, axis=1).mean(),
        "saturated": jnp.mean(jnp.abs(actions) > 0.95),
        "action_entropy": entropy.mean(),
        **{f"action_share/{i}": histogram[i] for i in range(BINS)},
    }


@partial(jax.jit, static_argnames=("agent",))
def _target_quality(agent: RFM, state: Any, obs: Float[Array, "B o"], key: PRNGKey) -> dict[str, Float[Array, ""]]:
    k_particles, k_x0, k_repeat, k_reference, k_uniform = jr.split(key, 5)
    lam, obs = agent.lam(state), jax.vmap(lambda o: seen(state.stats, o))(obs)
    support = agent.endpoints(state, obs, k_particles)
    x1 = support[:, 0]
    x0 = jr.normal(k_x0, x1.shape)

    def at(t, obs, x0, x1, support, key_repeat, key_reference):
        x_t = agent.path.perturb(x0, x1, t)
        log_pi = agent.log_pi(state.critic, obs, lam)
        post = jax.vmap(lambda k: agent.estimator(k, agent.path, log_pi, x_t, t, support))(
            jr.split(key_repeat, REPEATS)
        )
        exact = REFERENCE(key_reference, agent.path, log_pi, x_t, t)
        return post.ess.mean(), post.eta.mean(), jnp.mean((post.mean.mean(0) - exact.mean) ** 2), exact.ess

    n = obs.shape[0]

    def one_time(inputs):
        t, key_repeat, key_reference = inputs
        keys = jr.split(key_repeat, n), jr.split(key_reference, n)
        ess, eta, bias2, reference_ess = jax.vmap(at, (None, 0, 0, 0, 0, 0, 0))(t, obs, x0, x1, support, *keys)
        return ess.mean(), eta.mean(), jnp.sqrt(bias2.mean()), reference_ess.mean()

    count = len(TIMES)
    results = jax.lax.map(one_time, (jnp.array(TIMES), jr.split(k_repeat, count), jr.split(k_reference, count)))
    out = {
        f"{name}/{t}": values[i]
        for name, values in zip(("ess", "eta", "target_bias", "reference_ess"), results, strict=True)
        for i, t in enumerate(TIMES)
    }
    actions = jr.uniform(k_uniform, (64, x1.shape[1]), minval=-1.0, maxval=1.0)
    q = jax.vmap(lambda o: jax.vmap(lambda a: state.critic.value(o, a))(actions))(obs)
    return out | {"q_gap": jnp.mean(q.max(1) - q.min(1)) / lam}
