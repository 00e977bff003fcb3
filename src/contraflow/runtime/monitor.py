"""Watching a policy for failure, with a bound on false alarms (after FIPER, arXiv 2510.09459).

Two scores of every decision: how new the observation is (random network distillation), and how undecided the policy is
(entropy of the actions that it draws). Each is summed over a window and divided by a unit, the median of its largest
value in an episode. The smaller of the two, or the larger, is compared with one threshold, which comes from successful
episodes by conformal prediction: a successful episode that is exchangeable with them raises an alarm with probability
at most delta.

FIPER gives each score a threshold of its own at the same delta and wants both above. That keeps the bound too, but
wastes most of it: hardly any good episode exceeds both at once.
"""

import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from contraflow.core.observation import Observation
from contraflow.core.trust import Trust
from contraflow.core.types import EnvSpec, Obs, PRNGKey, UserError
from contraflow.envs.base import Env
from contraflow.nets.mlp import MLP
from contraflow.policy.artifact import load_policy
from contraflow.policy.base import Policy

CELL = 0.03  # width of a cell of actions, as a share of the range of calibration actions
FEATURES = 32


def chunk_entropy(actions: Float[Array, "B h a"], cell: Float[Array, " a"]) -> Float[Array, ""]:
    """Returns the entropy of B drawn chunks in bits, averaged over the h actions of a chunk.

    An action falls into a cell of a grid that begins a hundredth of the spread below the least drawn action. The result
    is 0 if all draws share a cell, log2 k for k equally full cells however far apart, and at most log2 B.
    """
    low, high = actions.min(0), actions.max(0)
    low = low - 0.01 * (high - low)
    index = jnp.floor((actions - low[None]) / cell[None, None])
    same = jnp.all(index[:, None] == index[None], -1)  # [B, B, h]
    return -jnp.mean(jnp.log2(jnp.mean(same, 0)))


def window_sums(scores: Float[np.ndarray, "T N"], window: int) -> Float[np.ndarray, "T N"]:
    """Returns the sums of the last `window` scores, of fewer at the start of an episode."""
    total = np.cumsum(scores, 0)
    return total - np.concatenate([np.zeros_like(total[:window]), total[:-window]])[: len(total)]


def order_statistic(scores: Float[np.ndarray, " M"], delta: float) -> float:
    """Returns the threshold that a new, exchangeable score exceeds with probability at most delta.

    It is number ceil((M + 1) (1 - delta)) of the sorted scores, and infinite if there are fewer than 1 / delta - 1.
    The empirical quantile has no such guarantee.
    """
    rank = math.ceil((len(scores) + 1) * (1 - delta) - 1e-9)
    return float(np.sort(scores)[rank - 1]) if rank <= len(scores) else math.inf


class Novelty(eqx.Module):
    """|f(o) - g(o)|^2 with g a fixed random network and f fitted to it on observations of successful episodes."""

    mean: Float[Array, " o"]
    std: Float[Array, " o"]
    random: MLP
    fitted: MLP

    def __call__(self, obs: Float[Array, " o"]) -> Float[Array, ""]:
        x = jnp.clip((obs - self.mean) / self.std, -10.0, 10.0)
        return jnp.mean((self.fitted(x) - self.random(x)) ** 2)

    @classmethod
    def fit(cls, obs: Float[Array, "n o"], key: PRNGKey, steps: int = 3000, width: int = 64) -> "Novelty":
        """Returns a novelty fitted to observations by Adam with batches of 256."""
        k_random, k_fitted, k_rows = jr.split(key, 3)
        size = obs.shape[1]
        start = cls(
            obs.mean(0),
            obs.std(0) + 1e-3,
            MLP(size, FEATURES, width, 2, key=k_random),
            MLP(size, FEATURES, width, 3, key=k_fitted),
        )
        tx = optax.adam(optax.cosine_decay_schedule(1e-3, steps, 0.01))

        def body(carry, key):
            net, opt = carry
            batch = obs[jr.randint(key, (256,), 0, obs.shape[0])]
            loss = lambda net: jnp.mean(jax.vmap(eqx.tree_at(lambda n: n.fitted, start, net))(batch))
            updates, opt = tx.update(jax.grad(loss)(net), opt, net)
            return (eqx.apply_updates(net, updates), opt), None

        fit = jax.jit(lambda net: jax.lax.scan(body, (net, tx.init(net)), jr.split(k_rows, steps))[0][0])
        return eqx.tree_at(lambda n: n.fitted, start, fit(start.fitted))


Rule = Literal["both", "either"]
"""Which scores must be above their thresholds at the same step."""


class Alarm(NamedTuple):
    """Scores of one decision, as multiples of their thresholds, and whether they raise an alarm."""

    novelty: float
    entropy: float
    alarm: bool


class Watch(eqx.Module):
    """A calibrated monitor: two scores and their thresholds, of which one or both must be exceeded."""

    novelty: Novelty
    cell: Float[Array, " a"]
    thresholds: Float[Array, " 2"]
    rule: Rule = eqx.field(static=True)
    window: int = eqx.field(static=True)
    draws: int = eqx.field(static=True)
    horizon: int = eqx.field(static=True)

    def scores(self, policy: Policy, obs: Obs, key: PRNGKey) -> Float[Array, " 2"]:
        """Returns (novelty, entropy) of one observation."""
        return jnp.stack(
            [self.novelty(obs), chunk_entropy(drawn(policy, obs, key, self.draws, self.horizon), self.cell)]
        )


class Monitor:
    """Watches one episode at a time: `monitor(obs)` at each decision, `reset()` at each start."""

    def __init__(self, watch: Watch, policy: Policy, seed: int = 0):
        self._watch, self._policy, self._key = watch, policy, jr.key(seed)
        self._score = jax.jit(lambda watch, policy, obs, key: watch.scores(policy, obs, key))
        self._seen: list[np.ndarray] = []
        self._count = 0

    def reset(self) -> None:
        """Starts another episode."""
        self._seen = []

    def __call__(self, obs: Any) -> Alarm:
        key = jr.fold_in(self._key, self._count)
        self._count += 1
        self._seen.append(np.asarray(self._score(self._watch, self._policy, jnp.asarray(obs, jnp.float32), key)))
        sums = np.sum(self._seen[-self._watch.window :], 0)
        ratio = sums / np.asarray(self._watch.thresholds)
        return Alarm(float(ratio[0]), float(ratio[1]), bool(_joint(self._watch.rule, ratio) > 1))


CHECK = "check.json"  # beside a watch: alarms in new episodes, good ones and others


def load_watch(folder: str | Path, trust: Trust = "") -> Watch:
    """Returns the watch that `contraflow monitor` wrote into a folder. Raises UserError if there is none."""
    place = Path(folder) / "monitor"
    if not place.is_dir():
        raise UserError(f"{folder} has no monitor: run `contraflow monitor {folder}`")
    return load_policy(place, trust)[0]


def drawn(policy: Policy, obs: Obs, key: PRNGKey, draws: int, horizon: int) -> Float[Array, "B h a"]:
    """Returns what the policy would do, in several draws."""
    actions = jax.vmap(lambda k: policy(obs, k))(jr.split(key, draws))
    return actions.reshape(draws, horizon, -1)


class Traces(NamedTuple):
    """One episode for each of N copies: observations, what the policy drew at each, and what became of it."""

    obs: Float[np.ndarray, "T N o"]
    plans: Float[np.ndarray, "T N B h a"]
    running: Bool[np.ndarray, "T N"]
    returns: Float[np.ndarray, " N"]
    success: Any  # [N] bool; None if the environment does not say

    def select(self, which: Any) -> "Traces":
        """Returns some of the episodes, by number or by a mask."""
        success = None if self.success is None else self.success[which]
        obs, plans, running = (x[:, which] for x in (self.obs, self.plans, self.running))
        return Traces(obs, plans, running, self.returns[which], success)


def trace(policy: Policy, spec: EnvSpec, env: Env, key: PRNGKey, draws: int = 32) -> Traces:
    """Plays one episode in every copy of an environment and returns what a monitor sees."""
    k_reset, k_act = jr.split(key)
    state, obs = env.reset(k_reset)
    n = env.spec.num_envs

    @jax.jit
    def act(policy, obs, i):
        keys = jr.split(jr.fold_in(k_act, i), n)
        return jax.vmap(lambda o, k: drawn(policy, o, k, draws, spec.horizon))(obs, keys)

    step = jax.jit(env.step) if env.spec.jittable else env.step
    running, rows = np.ones(n, bool), []
    returns, success = np.zeros(n), np.zeros(n, bool)
    said = False
    limit = env.spec.episode_length or 100_000
    for i in range(limit):
        plans = act(policy, jnp.asarray(obs), i)
        action = plans[:, 0].reshape(n, -1)
        state, after = step(state, action)
        rows.append((np.array(obs), np.array(plans), running.copy()))
        reward = after.reward if after.undiscounted is None else after.undiscounted
        returns += np.where(running, np.asarray(reward), 0.0)
        if after.success is not None:
            said = True
            success |= running & np.asarray(after.success)
        running &= ~np.asarray(after.terminated | after.truncated)
        obs = after.obs
        if not running.any():
            break
    observed, plans, alive = (np.stack(column) for column in zip(*rows, strict=True))
    return Traces(observed, plans, alive, returns, success if said else None)


def calibrate(
    good: Traces, observation: Observation, key: PRNGKey, delta: float = 0.1, window: int = 5, rule: Rule = "either"
) -> Watch:
    """Returns a monitor from successful episodes.

    Half of them, every other one, fit the novelty, the size of the cells and the units. The others set the threshold,
    so that they are exchangeable with later episodes. Raises UserError for images, and where delta needs more episodes.
    """
    if not isinstance(observation, int):
        raise UserError("a monitor watches vectors of observations: this policy takes images")
    n = good.obs.shape[1]
    if n // 2 < 1 / delta - 1:
        raise UserError(
            f"false alarms below {delta:g} need {2 * math.ceil(1 / delta - 1)} good episodes, there are {n}"
        )
    fit, rest = np.arange(n) % 2 == 0, np.arange(n) % 2 == 1
    novelty = Novelty.fit(jnp.asarray(good.obs[:, fit][good.running[:, fit]]), key)
    used = good.plans[:, fit][good.running[:, fit]]  # [rows, B, h, a]
    spread = used.max((0, 1, 2)) - used.min((0, 1, 2))
    cell = jnp.asarray(CELL * np.where(spread > 0, spread, max(spread.max(), 1e-6)))
    sums = np.stack([window_sums(score, window) for score in measured(novelty, cell, good)])  # [2, T, N]
    sums = np.where(good.running, sums, 0.0)
    units = np.maximum(np.median(sums[:, :, fit].max(1), 1), 1e-6)
    joint = _joint(rule, sums[:, :, rest] / units[:, None, None])
    thresholds = jnp.asarray(units * order_statistic(joint.max(0), delta))
    return Watch(novelty, cell, thresholds, rule, window, good.plans.shape[2], good.plans.shape[3])


def _joint(rule: Rule, ratios: Any) -> Any:
    """Returns the smaller or the larger of the two scores, which are the first axis."""
    return ratios.min(0) if rule == "both" else ratios.max(0)


def measured(novelty: Novelty, cell: Float[Array, " a"], found: Traces) -> tuple[np.ndarray, np.ndarray]:
    """Returns the novelty and the entropy [T, N] of every step of recorded episodes."""
    new = jax.jit(jax.vmap(jax.vmap(novelty)))(jnp.asarray(found.obs))
    entropy = jax.jit(lambda plans: jax.lax.map(jax.vmap(lambda p: chunk_entropy(p, cell)), plans))
    return np.asarray(new), np.asarray(entropy(jnp.asarray(found.plans)))


def alarms(watch: Watch, found: Traces) -> tuple[np.ndarray, np.ndarray]:
    """Returns whether each recorded episode [N] raises an alarm, and the step of the first (T if none)."""
    sums = np.stack([window_sums(score, watch.window) for score in measured(watch.novelty, watch.cell, found)])
    over = (_joint(watch.rule, sums / np.asarray(watch.thresholds)[:, None, None]) > 1) & found.running
    raised = np.asarray(over.any(0))
    return raised, np.where(raised, over.argmax(0), len(over))
