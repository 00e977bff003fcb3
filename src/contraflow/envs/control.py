"""Two swing-up tasks in pure JAX, so that training, even on many seeds, is one compiled program.

Both end only by their time limit, so every end is a truncation. All randomness comes from the key of `reset`.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from contraflow.core.types import EnvSpec, PRNGKey, Step
from contraflow.envs import episodes
from contraflow.envs.drawing import BLACK, BLUE, GREY, Disc, Path, Shape
from contraflow.envs.episodes import TaskState


@dataclass(frozen=True)
class Pendulum:
    """Gymnasium's Pendulum-v1: a rod of 1 kg and 1 m hangs from a motor too weak to lift it directly.

    - Body [angle, speed], angle 0 upright and kept in [-pi, pi), speed within 8 rad/s; observation [cos, sin, speed].
    - Action 1 is a torque of 2 Nm. One step is .05 s of semi-implicit Euler, as in Gymnasium.
    - Reward -(angle^2 + .1 speed^2 + .001 torque^2) of the state before the step; 200 steps, truncated.
    """

    num_envs: int = 1

    @property
    def spec(self) -> EnvSpec:
        return EnvSpec(3, 1, self.num_envs, 200, jittable=True)

    def start(self, key: PRNGKey) -> Float[Array, " s"]:
        """Draws any angle and a speed within 1 rad/s."""
        high = jnp.array([math.pi, 1.0])
        return jr.uniform(key, (2,), minval=-high, maxval=high)

    def observe(self, body: Float[Array, " s"]) -> Float[Array, " o"]:
        angle, speed = body
        return jnp.stack([jnp.cos(angle), jnp.sin(angle), speed])

    def move(self, body: Float[Array, " s"], action: Float[Array, " a"]) -> tuple[Float[Array, " s"], Float[Array, ""]]:
        """Returns (next body, reward) of one copy; `action` in [-1, 1]."""
        angle, speed = body
        torque = 2.0 * action[0]
        reward = -(angle**2 + 0.1 * speed**2 + 0.001 * torque**2)
        speed = jnp.clip(speed + 0.05 * (15.0 * jnp.sin(angle) + 3.0 * torque), -8.0, 8.0)
        return jnp.stack([_wrap(angle + 0.05 * speed), speed]), reward

    def reset(self, key: PRNGKey) -> tuple[TaskState, Float[Array, "N o"]]:
        return episodes.reset(self, key)

    def step(self, state: TaskState, action: Float[Array, "N a"]) -> tuple[TaskState, Step]:
        return episodes.step(self, state, action)

    def sketch(self, body: Float[Array, " s"]) -> list[Shape]:
        """Returns the shapes of motor and rod, in metres."""
        tip = (jnp.sin(body[0]), jnp.cos(body[0]))
        return [Disc((0.0, 0.0), 0.06, GREY), Path(((0.0, 0.0), tip), BLUE)]


@dataclass(frozen=True)
class CartpoleSwingup:
    """dm_control's cartpole swingup: a cart on a rail of 3.6 m swings a pole up and balances it at the centre.

    - Body [x, angle, dx, dangle], angle 0 upright and kept in [-pi, pi); observation [x, cos, sin, dx, dangle]. Both
      match dm_control, so that policies transfer.
    - Action 1 is a force of 10 N. One step is .01 s, one step of RK4; this and the soft ends of the rail match
      dm_control.
    - Reward in [0, 1] of the state after the step and the action; 1000 steps, truncated. With `sparse` it is that of
      dm_control's swingup_sparse, 1 where the pole is within 5.7 degrees of upright and the cart within .25 m, else 0.
    """

    num_envs: int = 1
    sparse: bool = False

    @property
    def spec(self) -> EnvSpec:
        return EnvSpec(5, 1, self.num_envs, 1000, jittable=True)

    def start(self, key: PRNGKey) -> Float[Array, " s"]:
        """Draws a start at rest in the middle with the pole hanging, plus noise of standard deviation .01."""
        x, angle, dx, dangle = 0.01 * jr.normal(key, (4,))
        return jnp.stack([x, _wrap(math.pi + angle), dx, dangle])

    def observe(self, body: Float[Array, " s"]) -> Float[Array, " o"]:
        x, angle, dx, dangle = body
        return jnp.stack([x, jnp.cos(angle), jnp.sin(angle), dx, dangle])

    def move(self, body: Float[Array, " s"], action: Float[Array, " a"]) -> tuple[Float[Array, " s"], Float[Array, ""]]:
        """Returns (next body, reward) of one copy; `action` in [-1, 1]."""
        force, h = 10.0 * action[0], 0.01
        k1 = cartpole_rates(body, force)
        k2 = cartpole_rates(body + 0.5 * h * k1, force)
        k3 = cartpole_rates(body + 0.5 * h * k2, force)
        k4 = cartpole_rates(body + h * k3, force)
        x, angle, dx, dangle = body + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        body = jnp.stack([x, _wrap(angle), dx, dangle])
        return body, cartpole_sparse_reward(body) if self.sparse else cartpole_reward(body, action)

    def reset(self, key: PRNGKey) -> tuple[TaskState, Float[Array, "N o"]]:
        return episodes.reset(self, key)

    def step(self, state: TaskState, action: Float[Array, "N a"]) -> tuple[TaskState, Step]:
        return episodes.step(self, state, action)

    def sketch(self, body: Float[Array, " s"]) -> list[Shape]:
        """Returns the shapes of rail, cart and pole, in metres."""
        x, angle, _, _ = body
        tip = (x + 2 * CENTRE * jnp.sin(angle), 2 * CENTRE * jnp.cos(angle))
        cart = ((x - 0.15, 0.0), (x + 0.15, 0.0))
        return [Path(((-RAIL, 0.0), (RAIL, 0.0)), GREY), Path(cart, BLACK), Path(((x, 0.0), tip), BLUE)]


# dm_control's cartpole.xml, in kg, m, s.
CART, POLE, CENTRE = 1.0, 0.1, 0.5  # masses; distance from the hinge to the middle of the pole
GRAVITY = 9.81
SLIDER_DAMPING, HINGE_DAMPING = 5e-4, 2e-6
RAIL = 1.8  # the soft ends are at +- RAIL


def _capsule_inertia(mass: float, length: float, radius: float) -> float:
    """Inertia about a transverse axis through the middle; `length` excludes the two half spheres."""
    cylinder = mass * length / (length + 4 / 3 * radius)
    sides = cylinder * (radius**2 / 4 + length**2 / 12)
    return sides + (mass - cylinder) * (0.4 * radius**2 + length**2 / 4 + 3 / 8 * length * radius)


INERTIA = _capsule_inertia(POLE, 2 * CENTRE, 0.045) + POLE * CENTRE**2  # about the hinge


def cartpole_rates(body: Float[Array, " s"], force: Float[Array, ""]) -> Float[Array, " s"]:
    """Returns the time derivative of [x, angle, dx, dangle] under a force on the cart.

    Lagrange's equations with s, c = sin, cos(angle), masses M, m, centre l, inertia J about the hinge, dampings d, e:
        (M + m) ddx + m l c ddangle = force + m l s dangle^2 - d dx
        m l c ddx + J ddangle = m g l s - e dangle
    """
    x, angle, dx, dangle = body
    s, c = jnp.sin(angle), jnp.cos(angle)
    coupling = POLE * CENTRE * c
    det = (CART + POLE) * INERTIA - coupling**2
    on_cart = force + POLE * CENTRE * s * dangle**2 - SLIDER_DAMPING * dx
    on_pole = POLE * GRAVITY * CENTRE * s - HINGE_DAMPING * dangle
    free = (INERTIA * on_cart - coupling * on_pole) / det
    on_cart = on_cart + _end_of_rail(x, dx, free, INERTIA / det)
    ddx = (INERTIA * on_cart - coupling * on_pole) / det
    ddangle = ((CART + POLE) * on_pole - coupling * on_cart) / det
    return jnp.stack([dx, dangle, ddx, ddangle])


def _end_of_rail(
    x: Float[Array, ""], dx: Float[Array, ""], free: Float[Array, ""], mobility: Float[Array, ""]
) -> Float[Array, ""]:
    """Returns the force of MuJoCo's soft joint limit (its documentation, "Constraint model"); 0 inside the rail.

    `free` is the acceleration of the cart without it, `mobility` the acceleration per unit of force. The limit pulls
    towards a critically damped return with time constant .08 (solreflimit). Its share of the motion grows from .9 to
    .95 over the first millimetre (solimp). The regularisation is scaled by the mobility of the upright pole.
    """
    side = jnp.sign(x)
    depth = jnp.abs(x) - RAIL
    w = jnp.clip(depth / 0.001, 0.0, 1.0)
    share = 0.9 + 0.05 * jnp.where(w < 0.5, 2 * w**2, 1 - 2 * (1 - w) ** 2)
    wanted = -2 / (0.95 * 0.08) * side * dx - share * depth / (0.95 * 0.08) ** 2
    upright = INERTIA / ((CART + POLE) * INERTIA - (POLE * CENTRE) ** 2)
    push = (wanted - side * free) / (mobility + (1 - share) / share * upright)
    return jnp.where(depth > 0, side * jnp.minimum(push, 0.0), 0.0)


def cartpole_reward(body: Float[Array, " s"], action: Float[Array, " a"]) -> Float[Array, ""]:
    """Returns dm_control's reward, a product of four factors: upright, centred, slow, and little force."""
    x, angle, _, dangle = body
    upright = (1 + jnp.cos(angle)) / 2
    centred = (1 + 0.1 ** ((x / 2) ** 2)) / 2
    slow = (1 + 0.1 ** ((dangle / 5) ** 2)) / 2
    gentle = (4 + jnp.maximum(1 - action[0] ** 2, 0.0)) / 5
    return upright * centred * slow * gentle


def cartpole_sparse_reward(body: Float[Array, " s"]) -> Float[Array, ""]:
    """Returns 1 where |x| <= .25 and cos(angle) >= .995, else 0."""
    upright, centred = jnp.cos(body[1]) >= 0.995, jnp.abs(body[0]) <= 0.25
    return (upright & centred).astype(float)


def _wrap(angle: Float[Array, ""]) -> Float[Array, ""]:
    """Returns the same angle in [-pi, pi), so that float32 keeps its precision however often the pole turns."""
    return jnp.mod(angle + math.pi, 2 * math.pi) - math.pi
