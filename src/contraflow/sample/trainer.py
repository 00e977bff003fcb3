"""Train a flow to an unnormalised density log pi(x1), x1 in R^d, without samples of it.

The velocity that carries N(0, I) to pi is v*(x_t, t) = E[alpha' x1 + beta' x0 | x_t], and an estimate of E[x1 | x_t]
from K calls of log pi is all that a regression needs:

    min over v of  E | v(x_t, t) - v^(x_t, t) |^2,    v^ = (beta'/beta) x_t + (D/beta) m^(x_t),   m^ ~ E[x1 | x_t].

The minimum is pointwise, so x_t may come from any law that reaches everywhere; it only decides where errors count.
Here x_t = alpha x1 + beta x0 with x1 from the current flow or, with probability `uniform`, uniform in a box: the first
puts queries where samples will pass, the second keeps modes that the flow has not found yet in play. The methods of the
literature differ by the estimator of m^ alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, Key

from contraflow.flow.density import LogDensity
from contraflow.flow.loss import matching_loss
from contraflow.flow.path import Linear, Path, Scalar, Vector
from contraflow.flow.posterior import Fixed, MinVariance, Reverse
from contraflow.flow.proposal import Mixture, Noise, Particles
from contraflow.flow.solve import Euler, ODESolver
from contraflow.nets.velocity import Velocity
from contraflow.rl.optim import descend
from contraflow.rl.optim import start as start_optimiser
from contraflow.types import PRNGKey

METHODS: dict[str, Reverse] = {
    "rfm": Reverse(control=MinVariance()),  # Reverse Flow Matching, 2601.08136, the official rule
    "qne": Reverse(control=Fixed(0.0)),  # noise-expectation
    "idem": Reverse(control=Fixed(1.0)),  # gradient-expectation
    "mixture": Reverse(  # ours: RFM with half of the candidates near current samples
        proposal=Mixture((Noise(), Particles(0.3))), control=MinVariance(shape="isotropic", centred=False)
    ),
}


@dataclass(frozen=True)
class Trainer:
    """`steps` updates on `batch` query points each; every query costs `estimator.samples` calls of the density."""

    estimator: Reverse = METHODS["rfm"]
    path: Path = Linear()
    steps: int = 2000
    batch: int = 64
    width: int = 64
    depth: int = 2
    learning_rate: float = 3e-3  # at the start; falls to 0 along a cosine
    max_grad_norm: float = 1.0
    box: float = 4.0
    """Half the side of the square that holds the target."""
    uniform: float = 0.25
    """Share of endpoints drawn from the box rather than from the flow."""
    bounded: bool = False
    """Project estimates of E[x1 | x_t] into the box: rare wild estimates cannot spoil the regression, at some bias."""
    t_min: float = 0.01
    """Times are uniform on (t_min, 1 - t_min)."""
    every: int = 50
    """Updates between two drawings of endpoints from the flow."""
    endpoints: int = 512
    particles: int = 32
    """Support of the proposal `Particles`; not used by others."""

    def __post_init__(self):
        for name in ("steps", "batch", "width", "depth", "every", "endpoints", "particles"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (self.learning_rate > 0 and self.box > 0 and 0 <= self.uniform <= 1 and 0 < self.t_min < 0.5):
            raise ValueError(f"needs learning_rate > 0, box > 0, uniform in [0, 1] and t_min in (0, .5): {self}")

    @property
    def critic_calls(self) -> int:
        """Calls of the density in all; with a control variate each call also gives the gradient."""
        return self.steps * self.batch * self.estimator.samples


def with_samples(estimator: Reverse, samples: int) -> Reverse:
    """The same estimator with K = `samples` candidates."""
    return replace(estimator, samples=samples)


PRNGKeys = Key[Array, " s"]


class FlowState(eqx.Module):
    """A flow in training; `rate` is the learning rate at the start, `step` counts updates."""

    net: Velocity
    opt: optax.OptState
    rate: Scalar
    step: Int[Array, ""]


def flow_field(net: Velocity, path: Path) -> Callable[[Vector, Scalar], Vector]:
    """v(x, t); the network sees x / sqrt(alpha^2 + beta^2), of size 1 where x1 is, and 10 t."""

    def field(x: Vector, t: Scalar) -> Vector:
        # Its time features are slow, sin(w t) with w <= 1: with 10 t it fits exact targets up to a third closer.
        return net(x / jnp.sqrt(path.alpha(t) ** 2 + path.beta(t) ** 2), 10.0 * t, jnp.zeros(0))

    return field


@partial(jax.jit, static_argnames=("trainer", "dim"))
def start(trainer: Trainer, keys: PRNGKeys, rates: Float[Array, " s"] | None = None, dim: int = 2) -> FlowState:
    """Fresh flows on R^dim, one per key; `rates` take the place of `trainer.learning_rate`."""

    def one(key: PRNGKey, rate: Scalar) -> FlowState:
        net = Velocity(dim, 0, trainer.width, trainer.depth, key=key)
        return FlowState(net, start_optimiser(_optimizer(trainer, rate), net), rate, jnp.zeros((), int))

    return jax.vmap(one)(keys, jnp.full(keys.shape[0], trainer.learning_rate) if rates is None else rates)


def _optimizer(trainer: Trainer, rate: Scalar) -> optax.GradientTransformation:
    decay = optax.cosine_decay_schedule(1.0, trainer.steps)
    return optax.chain(optax.clip_by_global_norm(trainer.max_grad_norm), optax.adam(lambda n: rate * decay(n)))


@partial(jax.jit, static_argnames=("path", "solver", "n", "dim"))
def draw(net: Velocity, path: Path, solver: ODESolver, key: PRNGKey, n: int, dim: int = 2) -> Float[Array, "{n} {dim}"]:
    """n samples of the flow."""
    x0 = path.source_scale * jr.normal(key, (n, dim))
    return jax.vmap(lambda x: solver(flow_field(net, path), x, 0.0, 1.0))(x0)


def _endpoints(trainer: Trainer, net: Velocity, key: PRNGKey) -> Float[Array, "n d"]:
    k_flow, k_box, k_which = jr.split(key, 3)
    dim = net.dim
    flow = draw(net, trainer.path, Euler(10), k_flow, trainer.endpoints, dim)
    box = jr.uniform(k_box, flow.shape, minval=-trainer.box, maxval=trainer.box)
    # A sample outside the box, or one that has diverged, is of no use as a query.
    keep = (jr.uniform(k_which, (trainer.endpoints,)) >= trainer.uniform) & jnp.all(jnp.abs(flow) <= trainer.box, 1)
    return jax.vmap(jnp.where)(keep, flow, box)


def _update(trainer: Trainer, log_pi: LogDensity, pool: Float[Array, "n d"], state: FlowState, key: PRNGKey):
    k_x1, k_x0, k_t, k_support, k_mean = jr.split(key, 5)
    path, n = trainer.path, trainer.batch
    x1 = jr.choice(k_x1, pool, (n,))
    t = jr.uniform(k_t, (n,), minval=trainer.t_min, maxval=1.0 - trainer.t_min)
    x_t = jax.vmap(path.perturb)(jr.normal(k_x0, x1.shape), x1, t)
    support = jr.choice(k_support, pool, (trainer.particles,))
    posterior = jax.vmap(lambda k, x, t: trainer.estimator(k, path, log_pi, x, t, support))
    mean = posterior(jr.split(k_mean, n), x_t, t).mean
    if trainer.bounded:
        mean = jnp.clip(mean, -trainer.box, trainer.box)

    def loss(net: Velocity) -> Scalar:
        return jnp.mean(jax.vmap(partial(matching_loss, flow_field(net, path), path))(mean, x_t, t))

    net, opt, value, _ = descend(_optimizer(trainer, state.rate), loss, state.net, state.opt)
    return FlowState(net, opt, state.rate, state.step + 1), value


def train_round(
    trainer: Trainer, log_pi: LogDensity, updates: int, state: FlowState, key: PRNGKey
) -> tuple[FlowState, Scalar]:
    """New endpoints from the flow, then `updates` updates; the mean loss."""
    k_pool, k_updates = jr.split(key)
    pool = _endpoints(trainer, state.net, k_pool)

    def body(state: FlowState, i: Int[Array, ""]):
        return _update(trainer, log_pi, pool, state, jr.fold_in(k_updates, i))

    state, losses = jax.lax.scan(body, state, jnp.arange(updates))
    return state, jnp.mean(losses)


def train(
    trainer: Trainer,
    log_pi: LogDensity,
    keys: PRNGKeys,
    rates: Float[Array, " s"] | None = None,
    dim: int = 2,
    progress: Callable[[int, float], None] | None = None,
) -> FlowState:
    """Flows for the typed keys [S], trained side by side; every leaf of the result has the leading axis S.

    `rates` [S] are learning rates that take the place of `trainer.learning_rate`; `progress(step, mean loss)` is called
    after every round.
    """
    rounds = [trainer.every] * (trainer.steps // trainer.every)
    if trainer.steps % trainer.every:
        rounds.append(trainer.steps % trainer.every)
    keys = jax.vmap(lambda k: jr.split(k, len(rounds) + 1))(keys)
    state = start(trainer, keys[:, 0], rates, dim)
    step = {n: jax.jit(jax.vmap(partial(train_round, trainer, log_pi, n)), donate_argnums=0) for n in set(rounds)}
    done = 0
    for i, updates in enumerate(rounds):
        state, loss = step[updates](state, keys[:, i + 1])
        done += updates
        if progress is not None:
            progress(done, float(jnp.mean(loss)))
    return state
