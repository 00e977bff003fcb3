"""Flow-GRPO (arXiv 2505.05470): a flow is a Markov chain with densities, improved by clipped policy gradients.

    rho_{i,k} = p(x_{k+1} | x_k) / p_old(x_{k+1} | x_k),    A_i = (r_i - mean of its group) / deviation,
    loss = mean_{i,k} w_k max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) + kl mean_{i,k} |mean - mean_ref|^2 / (2 std^2).

The whole family has this loss. Its members differ in the plan of the noise (flow/plan.py), in the weights w_k, in how
the ratio is guarded and in the anchor; each has a file of its own with its settings.

`kl` weighs the relative entropy of paths, D = sum_k D_k, step by step: a step pays for D_k, and not for what it makes
later steps pay. That is the published loss. Its fixed point is the reference times exp(r / kl) for linear rewards of
Gaussians only. With `kl_to_go`, std="none" in the advantage and ratio="sum" the loss has the gradient of E[r] - kl D,
divided by the number of noisy steps. Where the noise makes x_1 independent of x_0, the optimum is that tilt, up to the
error of finite steps.
"""

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.agents.align.base import (
    AlignState,
    Draws,
    Pairs,
    Scored,
    checked_flow,
    descend,
    encoded,
    field,
    first_state,
    flat,
    line,
    policy_of,
    repeated,
    with_pretrained,
)
from contraflow.agents.base import Preset, flow_of
from contraflow.core.optim import Optim, check_positive
from contraflow.core.types import EnvSpec, Metrics, PRNGKey
from contraflow.flow.model import Flow, FlowSpec
from contraflow.flow.plan import Noisy, Plan, generate
from contraflow.policy.base import Policy
from contraflow.rl.group import GroupAdvantage

Steps = Float[Array, "n w"]


@dataclass(frozen=True)
class Clip:
    """PPO's clip: max(-A rho, -A clip(rho, 1 - eps, 1 + eps))."""

    eps: float = 0.2

    def __post_init__(self):
        check_positive(self, "eps")

    def __call__(self, log_ratio: Steps, advantage: Steps, divergence: Steps) -> Steps:
        rho = jnp.exp(log_ratio)
        return jnp.maximum(-advantage * rho, -advantage * jnp.clip(rho, 1 - self.eps, 1 + self.eps))


@dataclass(frozen=True)
class Filter:
    """Flow-DPPO's trust region (2606.11025): -A rho, left out where the step has moved too far in the direction of A.

    A step counts as moved where |mean - mean_old|^2 / (2 std^2) >= `limit`.
    """

    limit: float = 0.02

    def __post_init__(self):
        check_positive(self, "limit")

    def __call__(self, log_ratio: Steps, advantage: Steps, divergence: Steps) -> Steps:
        onward = jnp.where(advantage > 0, log_ratio > 0, log_ratio < 0)
        return jnp.where((divergence >= self.limit) & onward, 0.0, -advantage * jnp.exp(log_ratio))


@dataclass(frozen=True)
class FlowGRPO:
    """Policy gradients through the noisy steps of a flow.

    Cost of a sample: K evaluations to draw it, and w with gradients (and w of the reference if kl > 0) to learn from
    it. Raises ValueError for values out of range.
    """

    flow: FlowSpec = FlowSpec()
    """The flow to align; a pretrained policy replaces it."""
    plan: Plan = Plan()
    advantage: GroupAdvantage = GroupAdvantage()
    group: Literal["condition", "start"] = "condition"
    """Samples with a common mean reward: those of a condition, or those that share a start in a tree (TempFlow)."""
    ratio: Literal["sum", "mean"] = "sum"
    """Densities, divergences and norms are summed over the d numbers of a sample, or averaged, as in the released code;
    with the mean a useful clip is about d times smaller."""
    guard: bool = False
    """GRPO-Guard: log rho has its mean removed and is multiplied by std, and each step weighs 1 / h."""
    weight: Literal["equal", "noise"] = "equal"
    """Weights of the noisy steps: all 1, or their standard deviation over its mean (TempFlow)."""
    trust: Clip | Filter = Clip()
    kl: float = 0.04
    """Weight of the divergence from the reference."""
    kl_to_go: bool = False
    """Advantages of a step are less by kl times the divergence of the steps after it."""
    data: float = 0.0
    """Weight of the matching loss on the data of the problem, or on samples of the reference where it has none
    (DDRL)."""
    minibatches: int = 2
    """Gradient steps for the samples of one iteration."""
    optim: Optim = Optim(3e-4, max_grad_norm=1.0)

    needs = "conditions"

    def __post_init__(self):
        check_positive(self, "minibatches")
        if self.kl < 0 or self.data < 0:
            raise ValueError(f"kl and data must not be negative, got {self.kl} and {self.data}")
        if self.kl_to_go and not self.kl:
            raise ValueError("kl_to_go needs kl > 0, the weight of the divergence")
        if self.group == "start" and self.leaves == 1:
            raise ValueError("a group of samples that share a start needs plan.branches")

    @property
    def leaves(self) -> int:
        """Samples that share a start; the size of a group is a multiple of it."""
        return self.plan.leaves

    def init(self, key: PRNGKey, spec: EnvSpec) -> AlignState:
        """Returns fresh networks; `adopt` inserts the pretrained flow."""
        return first_state(self.flow, self.optim, key, spec)

    def policy(self, state: AlignState) -> Policy:
        """Returns the end of the ODE from random noise."""
        return policy_of(state)

    def starting_from(self, policy: Policy) -> "FlowGRPO":
        """Returns the settings with the flow of a pretrained policy."""
        return replace(self, flow=checked_flow(flow_of(policy, self)[0].spec, "FlowGRPO"))

    def adopt(self, state: AlignState, policy: Policy) -> AlignState:
        """Returns the state with the networks of a pretrained policy."""
        return with_pretrained(state, self.flow, policy, self)

    def explore(self, state: AlignState, cond: Float[Array, "B c"], group: int, key: PRNGKey) -> Draws:
        """Returns samples, with their noisy steps."""
        k_start, k_x0, k_noise = jr.split(key, 3)
        start, roots = self.plan.start(state.step, k_start), group // self.leaves

        def one(cond, k_x0, k_noise):
            x0 = state.flow.noise(k_x0, 1 if self.plan.shared else roots)
            x0 = jnp.broadcast_to(x0, (roots, x0.shape[-1]))
            return generate(self.plan, field(state.flow, cond), x0, start, k_noise)

        n = cond.shape[0]
        end, steps = jax.vmap(one)(encoded(state, cond), jr.split(k_x0, n), jr.split(k_noise, n))
        return Draws(end, steps)

    def update(self, state: AlignState, scored: Scored, key: PRNGKey) -> tuple[AlignState, Metrics]:
        """Makes one gradient step on each share of the samples."""
        k_data, k_steps = jr.split(key)
        cond, steps = repeated(encoded(state, scored.cond), scored.reward.shape[1]), flat(scored.draws.extras)
        reference = self._means(state.reference, cond, steps) if self.kl else steps.mean
        rows = cond, self._credit(scored, steps, reference), steps, reference
        real = self._data(state, scored, k_data) if self.data else None

        def loss(flow, part, key):
            cond, advantage, steps, reference = part
            mean = self._means(flow, cond, steps)
            log_ratio, moved = self.log_ratio(steps, mean)
            losses = self.trust(log_ratio, advantage, jax.lax.stop_gradient(moved))
            value = jnp.mean(losses * self._weights(steps.std))
            metrics = {"moved": jnp.mean(moved), "log_ratio": jnp.mean(log_ratio)}
            if self.kl:
                divergence = jnp.mean(self._divergence(mean, reference, steps))
                value, metrics = value + self.kl * divergence, metrics | {"kl": divergence}
            if real is not None:
                matching = self._matching(flow, real, key)
                value, metrics = value + self.data * matching, metrics | {"data_loss": matching}
            return value, metrics

        return descend(self.optim, state, loss, rows, k_steps, self.minibatches)

    def log_ratio(self, steps: Noisy, mean: Float[Array, "n w d"]) -> tuple[Steps, Steps]:
        """Returns (log rho, D) for the means of a new flow, with D the divergence of the old flow from it.

        log rho = -gap . noise / std - D with gap = old mean - mean, noise = (new - old mean) / std and
        D = |gap|^2 / (2 std^2); guarded, it is std times its first term.
        """
        along = -self._reduce((steps.mean - mean) * (steps.new - steps.mean)) / steps.std**2
        moved = self._divergence(mean, steps.mean, steps)
        return (steps.std * along if self.guard else along - moved), moved

    def _means(self, flow: Flow, cond: Float[Array, "n c"], steps: Noisy) -> Float[Array, "n w d"]:
        """Returns the means of the noisy steps under a flow."""
        scales = self.plan.scales()

        def one(cond, x, k):
            at = lambda x, k, scale: self.plan.step(field(flow, cond), x, k, scale)[0]
            return jax.vmap(at)(x, k, scales)

        return jax.vmap(one)(cond, steps.x, steps.k)

    def _reduce(self, x: Float[Array, "n w d"]) -> Steps:
        return jnp.sum(x, -1) if self.ratio == "sum" else jnp.mean(x, -1)

    def _divergence(self, one: Float[Array, "n w d"], two: Float[Array, "n w d"], steps: Noisy) -> Steps:
        """Returns the relative entropy of steps with these means."""
        return self._reduce((one - two) ** 2) / (2 * steps.std**2)

    def _credit(self, scored: Scored, steps: Noisy, reference: Float[Array, "n w d"]) -> Steps:
        """Returns the advantage of each step."""
        reward, weights = scored.reward, scored.weights
        samples = reward.shape[1] if self.group == "condition" else self.leaves
        grouped = lambda x: x.reshape(-1, samples, x.shape[-1])
        advantage = self.advantage(grouped(reward), weights).reshape(-1, 1)
        paid = self._divergence(steps.mean, reference, steps)
        if not self.kl_to_go:
            return jnp.broadcast_to(advantage, paid.shape)
        later = grouped(jnp.cumsum(paid[:, ::-1], 1)[:, ::-1] - paid)
        others = samples / max(samples - 1, 1)
        centred = others * (later - jnp.mean(later, 1, keepdims=True))
        return advantage - self.kl * centred.reshape(paid.shape)

    def _weights(self, std: Steps) -> Steps:
        """Weights of the noisy steps."""
        if self.guard:
            return jnp.full_like(std, 1.0 / self.plan.h)
        if self.weight == "equal":
            return jnp.ones_like(std)
        k = jnp.arange(self.plan.starts + self.plan.noisy - 1)
        zero = jnp.zeros(1)
        every = jax.vmap(lambda k: self.plan.noise(zero, zero, k * self.plan.h, self.plan.h)[1])(k)
        return std / jnp.mean(every)

    def _data(self, state: AlignState, scored: Scored, key: PRNGKey) -> Pairs:
        """Returns rows to hold the flow to, with conditions as the networks take them."""
        if scored.data is not None:
            return Pairs(encoded(state, scored.data.cond), state.flow.spec.support.latent(scored.data.x))
        cond, n = encoded(state, scored.cond), scored.reward.shape[1]
        x1 = jax.vmap(lambda c, k: state.reference.particles(c, k, n)[1])(cond, jr.split(key, cond.shape[0]))
        return Pairs(repeated(cond, n), flat(x1))

    def _matching(self, flow: Flow, rows: Pairs, key: PRNGKey) -> Float[Array, ""]:
        def one(cond, x1, key):
            x, t, u = line(flow, x1, key)
            return jnp.mean((field(flow, cond)(x, t) - u) ** 2)

        return jnp.mean(jax.vmap(one)(rows.cond, rows.x, jr.split(key, rows.x.shape[0])))


PRESETS = (
    Preset(
        "flow-grpo", FlowGRPO(), "Flow-GRPO", "2505.05470", "clipped policy gradients on a noisy flow", "conditions"
    ),
)
