"""Flow AIS Bootstrap without the density of a flow: annealed importance sampling, a buffer, weighted flow matching.

FAB (Midgley et al., 2208.01893) fits a normalising flow to p by annealed importance samples. It minimises the
alpha-divergence. At alpha = 1 its gradient is E_p[grad log q], so q enters only through the points where annealing
starts. For a flow ODE, regression on points x1 with weights w replaces the likelihood:

    min over v of  sum_i w_i E_{t, x0} | v(x_t, t) - (alpha' x1_i + beta' x0) |^2,    x_t = alpha x1_i + beta x0.

Its minimum is the velocity that carries N(0, I) to sum_i w_i delta(x1_i), hence to p as their number grows. Annealing
starts not from the flow but from a Gaussian with the moments of the buffer, because its density is known.
"""

from dataclasses import dataclass, replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int

from contraflow.core.types import PRNGKey
from contraflow.flow.path import Scalar, Vector
from contraflow.flow.posterior.proposal import systematic
from contraflow.flow.targets import LogDensity, log_normal
from contraflow.sampling.trainer import FlowState, Trainer, noised, regress

Temperatures = Float[Array, " T"]


class Annealed(eqx.Module):
    """The end `x` of a chain, with weight w = exp(log_w), E[w f(x)] = integral of pi f, and `accept` [T] in [0, 1]."""

    x: Vector
    log_w: Scalar
    accept: Temperatures


def anneal(
    key: PRNGKey, log_pi: LogDensity, mean: Vector, std: Vector, betas: Temperatures, sizes: Temperatures
) -> Annealed:
    """Annealed importance sampling (Neal 2001) from N(mean, diag std^2), normalised, to exp(log_pi).

    The path is log f_j = (1 - beta_j) log base + beta_j log pi, with 0 = beta_0 <= beta_1 <= ... <= beta_T = 1 (`betas`
    [T], without the 0). Each step adds log w += (beta_j - beta_{j-1}) (log pi - log base)(x), then moves x by
    Metropolis-adjusted Langevin (Hamiltonian Monte Carlo with one leapfrog step), which leaves f_j invariant. The moves
    have length `sizes`_j in units of `std`. E[w] = integral of exp(log_pi) for any number of temperatures and any
    quality of the moves. It costs 1 + T calls of log_pi with its gradient. log_pi may be -inf but not NaN.
    """
    k_start, k_momenta, k_accept = jr.split(key, 3)
    log_pi_grad = jax.value_and_grad(log_pi)

    def log_base(x: Vector) -> Scalar:
        return log_normal(x, mean, std)

    def step(carry, inputs):
        """Reweights to the next temperature, then moves. State: (x, log pi, gradient), log w, last beta."""
        (x, log_p, grad), log_w, last = carry
        beta, size, momentum, place = inputs
        log_w = log_w + (beta - last) * (log_p - log_base(x))

        def force(x, grad):  # std times the gradient of log f_j
            return (1.0 - beta) * (mean - x) / std + beta * std * grad

        def energy(x, log_p, momentum):
            return 0.5 * jnp.sum(momentum**2) - (1.0 - beta) * log_base(x) - beta * log_p

        half = momentum + 0.5 * size * force(x, grad)
        new = x + size * std * half
        new_p, new_grad = log_pi_grad(new)
        gain = energy(x, log_p, momentum) - energy(new, new_p, half + 0.5 * size * force(new, new_grad))
        # NaN marks a move from or to a place without density.
        accept = jnp.where(jnp.isnan(gain), 0.0, jnp.exp(jnp.minimum(gain, 0.0)))
        move = place < accept
        x, log_p, grad = jax.tree.map(partial(jnp.where, move), (new, new_p, new_grad), (x, log_p, grad))
        return ((x, log_p, grad), log_w, beta), accept

    x = mean + std * jr.normal(k_start, mean.shape)
    start = (x, *log_pi_grad(x)), jnp.zeros(()), jnp.zeros(())
    n = betas.shape[0]
    inputs = betas, sizes, jr.normal(k_momenta, (n, *x.shape)), jr.uniform(k_accept, (n,))
    ((x, _, _), log_w, _), accept = jax.lax.scan(step, start, inputs)
    return Annealed(x, log_w, accept)


class Buffer(eqx.Module):
    """The newest points [n, d] with their weights (log_w = -inf for empty places), their count, and the move sizes."""

    x: Float[Array, "n d"]
    log_w: Float[Array, " n"]
    count: Int[Array, ""]
    sizes: Temperatures

    def log_z(self) -> Scalar:
        """Returns log of the mean weight [], which estimates log integral of exp(log_pi)."""
        return jax.nn.logsumexp(self.log_w) - jnp.log(self.count)

    def ess(self) -> Scalar:
        """Returns the effective number of points [], (sum w)^2 / sum w^2."""
        return 1.0 / jnp.sum(jax.nn.softmax(self.log_w) ** 2)


@dataclass(frozen=True)
class Fab:
    """Uses as many density calls as a method with `samples` per query point.

    A round of n updates runs n batch samples / (1 + temperatures) chains. Raises ValueError if that is not a whole
    number, or for settings that are not positive.
    """

    samples: int = 128
    temperatures: int = 63
    prior: float = 50.0
    """Weight of the wide Gaussian of the first round, in points, when later Gaussians are fitted to the buffer."""

    def __post_init__(self):
        if not (self.samples > 0 and self.temperatures > 0 and self.prior > 0):
            raise ValueError(f"Fab needs samples, temperatures and prior above 0: {self}")

    def with_samples(self, samples: int) -> "Fab":
        return replace(self, samples=samples)

    def chains(self, trainer: Trainer, updates: int) -> int:
        """Returns the number of chains in a round with this many updates."""
        chains, rest = divmod(updates * trainer.batch * self.samples, 1 + self.temperatures)
        if rest:
            raise ValueError(
                f"fab makes 1 + {self.temperatures} density calls per chain: that must divide the "
                f"{updates} x {trainer.batch} x {self.samples} of {updates} updates"
            )
        return chains

    def calls(self, trainer: Trainer, updates: int) -> int:
        return self.chains(trainer, updates) * (1 + self.temperatures)

    def memory(self, trainer: Trainer, key: PRNGKey, dim: int) -> Buffer:
        n = trainer.kept * self.chains(trainer, trainer.rounds[0])
        sizes = jnp.full(self.temperatures, 0.3)
        return Buffer(jnp.zeros((n, dim)), jnp.full(n, -jnp.inf), jnp.zeros((), int), sizes)

    def base(self, buffer: Buffer, box: float) -> tuple[Vector, Vector]:
        """Returns mean and standard deviation, each [d], of the Gaussian that annealing starts from.

        It pools the moments of the weighted buffer, counted by its effective number of points, with those of
        N(0, (box / 2)^2), counted as `prior` points.
        """
        ess = jnp.where(buffer.count > 0, buffer.ess(), 0.0)
        w = jnp.where(buffer.count > 0, jax.nn.softmax(buffer.log_w), 0.0)
        share = ess / (ess + self.prior)
        mean = share * (w @ buffer.x)
        second = share * (w @ buffer.x**2) + (1.0 - share) * (0.5 * box) ** 2
        return mean, jnp.sqrt(second - mean**2)

    def fill(self, trainer: Trainer, log_pi: LogDensity, updates: int, buffer: Buffer, key: PRNGKey) -> Buffer:
        """Adds the points of a round and drops the oldest; adapts move sizes towards an acceptance of .65."""
        chains, (mean, std) = self.chains(trainer, updates), self.base(buffer, trainer.box)
        betas = (jnp.arange(1, self.temperatures + 1) / self.temperatures) ** 2  # denser where the density is flat
        one = lambda key: anneal(key, log_pi, mean, std, betas, buffer.sizes)
        new = jax.vmap(one)(jr.split(key, chains))
        # Only between rounds: within one, moves that depend on each other would not leave f_j invariant.
        sizes = buffer.sizes * jnp.exp(new.accept.mean(0) - 0.65)
        n = buffer.x.shape[0]
        x, log_w = jnp.concatenate([new.x, buffer.x])[:n], jnp.concatenate([new.log_w, buffer.log_w])[:n]
        return Buffer(x, log_w, jnp.minimum(buffer.count + chains, n), sizes)

    def endpoints(self, buffer: Buffer, key: PRNGKey, n: int) -> Float[Array, "{n} d"]:
        """Returns n points of the buffer, in random order, by systematic resampling with weights w: a sample of pi."""
        # FAB's priorities change with the flow, but not at alpha = 1.
        k_pick, k_order = jr.split(key)
        return buffer.x[jr.permutation(k_order, systematic(k_pick, jax.nn.softmax(buffer.log_w), n))]

    def round(
        self, trainer: Trainer, log_pi: LogDensity, updates: int, state: FlowState, key: PRNGKey
    ) -> tuple[FlowState, Scalar]:
        """Adds points to the buffer, makes `updates` updates on points drawn from it, returns the mean loss."""
        k_fill, k_points, k_updates = jr.split(key, 3)
        buffer = self.fill(trainer, log_pi, updates, state.memory, k_fill)
        points = self.endpoints(buffer, k_points, updates * trainer.batch).reshape(updates, trainer.batch, -1)

        def query(key: PRNGKey, x1):
            k_x0, k_t = jr.split(key)
            return x1, *noised(trainer, k_x0, k_t, x1)

        queries = jax.vmap(query)(jr.split(k_updates, updates), points)
        body = lambda state, inputs: regress(trainer, state, *inputs)
        state, losses = jax.lax.scan(body, replace(state, memory=buffer), queries)
        return state, jnp.mean(losses)
