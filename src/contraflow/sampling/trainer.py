"""Train a flow on an unnormalised density log pi(x1), x1 in R^d, without samples of it.

The velocity that carries N(0, I) to pi is v*(x_t, t) = E[alpha' x1 + beta' x0 | x_t]. With an estimate of E[x1 | x_t]:

    min over v of  E | v(x_t, t) - v^(x_t, t) |^2,    v^ = (beta'/beta) x_t + (D/beta) m^(x_t),   m^ ~ E[x1 | x_t].

The minimum is pointwise, so x_t may have any distribution with full support, which only weights the errors. Here
x_t = alpha x1 + beta x0 with x1 from the current flow or, with probability `uniform`, uniform in a box. The flow puts
queries where samples will pass, and the box covers modes that the flow has not found yet. Most published methods differ
only in the estimator of m^; `methods.py` lists them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from contraflow.core.optim import gradient_step
from contraflow.core.types import PRNGKey
from contraflow.flow.matching import posterior_error, square
from contraflow.flow.model import Flow, FlowSpec, Predict
from contraflow.flow.path import Linear, Path, Scalar
from contraflow.flow.posterior.importance import MinVariance, Reverse
from contraflow.flow.solver import Drift, Euler, ODESolver
from contraflow.flow.support import Real
from contraflow.flow.targets import LogDensity
from contraflow.nets.velocity import ResidualMLP

PRNGKeys = Key[Array, " s"]
NOTHING = jnp.zeros(0)  # the condition of an unconditional flow


class FlowState(eqx.Module):
    """A flow in training; `rate` is the initial learning rate, `step` counts updates, `memory` is the method's."""

    flow: Flow
    opt: optax.OptState
    rate: Scalar
    step: Int[Array, ""]
    memory: PyTree


@runtime_checkable
class Method(Protocol):
    """Settings of a method: how a round finds endpoints, and what the flow is fitted to there."""

    def with_samples(self, samples: int) -> "Method":
        """Returns the same method with K = `samples` density calls per query point."""
        ...

    def calls(self, trainer: "Trainer", updates: int) -> int:
        """Returns the density calls of a round with this many updates."""
        ...

    def memory(self, trainer: "Trainer", key: PRNGKey, dim: int) -> PyTree:
        """Returns `FlowState.memory` before the first round."""
        ...

    def round(
        self, trainer: "Trainer", log_pi: LogDensity, updates: int, state: FlowState, key: PRNGKey
    ) -> tuple[FlowState, Scalar]:
        """Makes `updates` updates with new endpoints; returns the state and the mean loss."""
        ...


@dataclass(frozen=True)
class Estimated:
    """Regresses on estimates of E[x1 | x_t], with `estimator.samples` density calls for every query point.

    x1 is one of the `endpoints` drawn in each of the last rounds, from the flow or uniform in the box. Raises
    ValueError unless endpoints and particles are positive and uniform lies in [0, 1].
    """

    estimator: Reverse = Reverse(control=MinVariance())
    uniform: float = 0.25
    """Share of endpoints drawn from the box rather than from the flow."""
    bounded: bool = False
    """Project estimates of E[x1 | x_t] into the box: this protects the regression from outliers, at some bias."""
    endpoints: int = 512
    particles: int = 32
    """Support points of the proposal `Particles`; unused by others."""

    def __post_init__(self):
        if not (self.endpoints > 0 and self.particles > 0 and 0 <= self.uniform <= 1):
            raise ValueError(f"Estimated needs endpoints and particles above 0 and uniform in [0, 1]: {self}")

    def with_samples(self, samples: int) -> "Estimated":
        return replace(self, estimator=replace(self.estimator, samples=samples))

    def calls(self, trainer: "Trainer", updates: int) -> int:
        return updates * trainer.batch * self.estimator.samples

    def memory(self, trainer: "Trainer", key: PRNGKey, dim: int) -> Float[Array, "n {dim}"]:
        return jr.uniform(key, (trainer.kept * self.endpoints, dim), minval=-trainer.box, maxval=trainer.box)

    def round(
        self, trainer: "Trainer", log_pi: LogDensity, updates: int, state: FlowState, key: PRNGKey
    ) -> tuple[FlowState, Scalar]:
        """Draws new endpoints from the flow, makes `updates` updates, returns the state and the mean loss."""
        k_pool, k_updates = jr.split(key)
        pool = jnp.concatenate([self.draw(trainer, state.flow, k_pool), state.memory])[: trainer.kept * self.endpoints]

        def body(state: FlowState, i: Int[Array, ""]):
            return self._update(trainer, log_pi, state, jr.fold_in(k_updates, i))

        state, losses = jax.lax.scan(body, replace(state, memory=pool), jnp.arange(updates))
        return state, jnp.mean(losses)

    def draw(self, trainer: "Trainer", flow: Flow, key: PRNGKey) -> Float[Array, "n d"]:
        """Returns the endpoints [n, d] of one round."""
        k_flow, k_box, k_which = jr.split(key, 3)
        ends = draw(trainer, flow, Euler(10), k_flow, self.endpoints)
        box = jr.uniform(k_box, ends.shape, minval=-trainer.box, maxval=trainer.box)
        # A sample outside the box, or one that has diverged, is useless as a query.
        keep = (jr.uniform(k_which, (self.endpoints,)) >= self.uniform) & jnp.all(jnp.abs(ends) <= trainer.box, 1)
        return jax.vmap(jnp.where)(keep, ends, box)

    def _update(self, trainer: "Trainer", log_pi: LogDensity, state: FlowState, key: PRNGKey):
        k_x1, k_x0, k_t, k_support, k_mean = jr.split(key, 5)
        pool, path, n = state.memory, trainer.path, trainer.batch
        x_t, t = noised(trainer, k_x0, k_t, jr.choice(k_x1, pool, (n,)))
        support = jr.choice(k_support, pool, (self.particles,))
        posterior = jax.vmap(lambda k, x, t: self.estimator(k, path, log_pi, x, t, support))
        mean = posterior(jr.split(k_mean, n), x_t, t).mean
        if self.bounded:
            mean = jnp.clip(mean, -trainer.box, trainer.box)
        return regress(trainer, state, mean, x_t, t)


@dataclass(frozen=True)
class Trainer:
    """A method, and the parts that all methods share: network, regression and the loop of rounds of `every` updates.

    Raises ValueError for settings out of range, or density calls that the method cannot divide evenly.
    """

    method: Method = Estimated()
    path: Path = Linear()
    predict: Predict = "velocity"
    """What the network returns."""
    steps: int = 2000
    """Updates."""
    batch: int = 64
    """Query points per update."""
    width: int = 64
    depth: int = 2
    learning_rate: float = 3e-3  # initial; falls to 0 along a cosine
    max_grad_norm: float = 1.0
    box: float = 4.0
    """Half the side of the cube that holds the target."""
    t_min: float = 0.01
    """Times are uniform on (t_min, 1 - t_min)."""
    every: int = 50
    """Updates between two draws of endpoints."""
    kept: int = 1
    """Number of rounds with endpoints in memory."""

    def __post_init__(self):
        for name in ("steps", "batch", "width", "depth", "every", "kept"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (self.learning_rate > 0 and self.box > 0 and 0 < self.t_min < 0.5):
            raise ValueError(f"Trainer needs learning_rate > 0, box > 0 and t_min in (0, .5): {self}")
        _ = self.critic_calls

    @property
    def flow(self) -> FlowSpec:
        """Settings of the flow on R^d.

        The network sees inputs scaled to unit size and 10 t. Its time features are slow, sin(w t) with w <= 1, and with
        10 t it fits exact targets up to a third more closely.
        """
        network = ResidualMLP(self.width, self.depth, 128)
        return FlowSpec(self.path, self.predict, Real(), Euler(10), clock=10.0, unit_input=True, network=network)

    @property
    def rounds(self) -> list[int]:
        """The number of updates of each round."""
        whole, rest = divmod(self.steps, self.every)
        return [self.every] * whole + [rest] * (rest > 0)

    @property
    def critic_calls(self) -> int:
        """Total number of density calls; a call that also returns the gradient counts once."""
        return sum(self.method.calls(self, updates) for updates in self.rounds)

    def with_samples(self, samples: int) -> "Trainer":
        """Returns the same trainer with K = `samples` density calls per query point."""
        return replace(self, method=self.method.with_samples(samples))


@partial(jax.jit, static_argnames=("trainer", "dim"))
def start(trainer: Trainer, keys: PRNGKeys, rates: Float[Array, " s"] | None = None, dim: int = 2) -> FlowState:
    """Returns fresh flows on R^dim, one per key; `rates` [S] replace `trainer.learning_rate`."""

    def one(key: PRNGKey, rate: Scalar) -> FlowState:
        flow: Any = trainer.flow.init(key, dim, 0)
        opt = _optimizer(trainer, rate).init(flow)
        return FlowState(flow, opt, rate, jnp.zeros((), int), trainer.method.memory(trainer, jr.fold_in(key, 1), dim))

    return jax.vmap(one)(keys, jnp.full(keys.shape[0], trainer.learning_rate) if rates is None else rates)


def _optimizer(trainer: Trainer, rate: Scalar) -> optax.GradientTransformation:
    decay = optax.cosine_decay_schedule(1.0, trainer.steps)
    return optax.chain(optax.clip_by_global_norm(trainer.max_grad_norm), optax.adam(lambda n: rate * decay(n)))


def field(flow: Flow) -> Drift:
    """Returns the velocity v(x, t) of the flow, whatever its network predicts."""
    return lambda x, t: flow.velocity(x, t, NOTHING)


@partial(jax.jit, static_argnames=("trainer", "solver", "n"))
def draw(trainer: Trainer, flow: Flow, solver: ODESolver, key: PRNGKey, n: int) -> Float[Array, "{n} d"]:
    """Returns n samples of the flow [n, d]."""
    return jax.vmap(lambda x: solver(field(flow), x, 0.0, 1.0))(flow.noise(key, n))


def regress(
    trainer: Trainer, state: FlowState, x1: Float[Array, "b d"], x_t: Float[Array, "b d"], t: Float[Array, " b"]
) -> tuple[FlowState, Scalar]:
    """Makes one update of the network towards the velocity (or noise) implied by the means `x1`; returns the loss."""

    def loss(flow: Flow) -> Scalar:
        one = lambda x1, x_t, t: square(posterior_error(flow, NOTHING, x1, x_t, t))
        return jnp.mean(jax.vmap(one)(x1, x_t, t))

    flow, opt, value, _ = gradient_step(_optimizer(trainer, state.rate), loss, state.flow, state.opt)
    return replace(state, flow=flow, opt=opt, step=state.step + 1), value


def noised(trainer: Trainer, k_x0: PRNGKey, k_t: PRNGKey, x1: Float[Array, "b d"]):
    """Returns (x_t [b, d], t [b]) for endpoints x1 [b, d] at random times."""
    t = jr.uniform(k_t, x1.shape[:1], minval=trainer.t_min, maxval=1.0 - trainer.t_min)
    return jax.vmap(trainer.path.perturb)(jr.normal(k_x0, x1.shape), x1, t), t


def train(
    trainer: Trainer,
    log_pi: LogDensity,
    keys: PRNGKeys,
    rates: Float[Array, " s"] | None = None,
    dim: int = 2,
    progress: Callable[[int, float], None] | None = None,
) -> FlowState:
    """Trains flows for the typed keys [S] side by side; every leaf of the result has the leading axis S.

    The learning rates `rates` [S] replace `trainer.learning_rate`. `progress(step, mean loss)` is called after every
    round.
    """
    rounds = trainer.rounds
    keys = jax.vmap(lambda k: jr.split(k, len(rounds) + 1))(keys)
    state = start(trainer, keys[:, 0], rates, dim)
    step = {
        n: jax.jit(jax.vmap(partial(trainer.method.round, trainer, log_pi, n)), donate_argnums=0) for n in set(rounds)
    }
    done = 0
    for i, updates in enumerate(rounds):
        state, loss = step[updates](state, keys[:, i + 1])
        done += updates
        if progress is not None:
            progress(done, float(jnp.mean(loss)))
    return state
