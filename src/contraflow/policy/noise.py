"""A policy as a function of the observation and of noise: (s, z) -> a, with z ~ N(0, I) in place of a key.

Other programs cannot make the random numbers of JAX. A policy that is exported takes them as an input, so they can be
drawn anywhere, kept to repeat an action, or chosen to steer the policy. `with_noise` traces a policy once, replaces its
random draws by parts of z, and unrolls its short loops.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import jax.random as jr
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array, Float

from contraflow.core.observation import Observation, blank
from contraflow.core.types import Obs, PRNGKey, UserError

UNROLL = 16
"""The longest loop that is unrolled. Unrolled samplers are faster, and loops make smaller files."""
CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2")
"""Primitives that only call a function, by their names in all supported versions of JAX."""
Noise = Float[Array, " n"]
Draw = Callable[[str, tuple[int, ...], list[Any], Callable[[], Any]], Any]
"""(name of a function of jax.random, shape of the draw, its scalar arguments, the draw itself) -> what is used."""


def _uniform(z: Array, low: Any, high: Any) -> Array:
    return low + (high - low) * ndtr(z)


def _from_uniform(u: Array, low: Any, high: Any) -> Array:
    return ndtri((u - low) / (high - low))


DRAWS: dict[str, tuple[Callable[..., Array], Callable[..., Array]]] = {
    "_normal": (lambda z: z, lambda x: x),
    "_uniform": (_uniform, _from_uniform),
    "_gumbel": (lambda z: -jnp.log(-jnp.log(ndtr(z))), lambda g: ndtri(jnp.exp(-jnp.exp(-g)))),
}
"""(draw made from z ~ N(0, 1) and the arguments, z made from the draw) by the name of the function that draws."""


class _Key:
    """Stands for the key, and everything computed from it, where there is no key."""


KEY = _Key()


@dataclass(frozen=True)
class WithNoise:
    """`act(obs, z [size])` is the action [a] that the policy takes with the key for which `draw(key)` returns z.

    z is N(0, I) for a random key. Both take one sample; `vmap` them over batches.
    """

    size: int
    draw: Callable[[PRNGKey], Noise]
    act: Callable[[Obs, Noise], Float[Array, " a"]]


def with_noise(policy: Any, observation: Observation, unroll: int = UNROLL) -> WithNoise:
    """Returns the greedy `policy` as a function of noise, with loops of at most `unroll` steps unrolled.

    Raises UserError if it draws from other distributions than the normal, uniform and Gumbel ones, or within a loop
    that is longer.
    """
    like = blank(observation)
    with jax.default_matmul_precision("highest"):  # accelerators would round the factors
        closed = jax.make_jaxpr(lambda obs, key: policy(obs, key, True))(like, jr.key(0))

    def act(obs: Obs, z: Noise) -> Float[Array, " a"]:
        taken = 0

        def take(name: str, shape: tuple[int, ...], arguments: list[Any], drawn: Callable[[], Any]) -> Array:
            nonlocal taken
            part = z[taken : taken + prod(shape)].reshape(shape)
            taken += prod(shape)
            return DRAWS[name][0](part, *arguments)

        (action,) = _evaluate(closed.jaxpr, closed.consts, [*jax.tree.leaves(obs), KEY], take, unroll)
        if action is KEY:
            raise UserError(
                "random numbers of this policy cannot become an input: it must draw them by jax.random.normal, "
                f"uniform, gumbel or categorical, outside of loops with more than {unroll} steps"
            )
        return action

    def draw(key: PRNGKey) -> Noise:
        parts: list[Array] = [jnp.zeros(0)]

        def keep(name: str, shape: tuple[int, ...], arguments: list[Any], drawn: Callable[[], Any]) -> Array:
            found = drawn()
            parts.append(DRAWS[name][1](found, *arguments).reshape(-1))
            return found

        obs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        _evaluate(closed.jaxpr, closed.consts, [*jax.tree.leaves(obs), key], keep, unroll)
        return jnp.concatenate(parts)

    found = WithNoise(jax.eval_shape(draw, jr.key(0)).shape[0], draw, act)
    jax.eval_shape(act, like, jax.ShapeDtypeStruct((found.size,), jnp.float32))
    return found


def _evaluate(jaxpr: Any, consts: Any, inputs: list[Any], draw: Draw, unroll: int) -> list[Any]:
    """Returns the outputs of a jaxpr. Draws are what `draw` says, and what depends on KEY otherwise is KEY."""
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

    def value(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else values[atom]

    for eqn in jaxpr.eqns:
        given, kind, params = [value(atom) for atom in eqn.invars], eqn.primitive.name, eqn.params
        if _draws(eqn):
            shape = eqn.outvars[0].aval.shape
            out = [draw(params["name"], shape, given[1:], lambda e=eqn, g=given: _bind(e, g)[0])]
        elif kind in CALLS:
            out = _evaluate(*_inside(params), given, draw, unroll)
        elif kind == "scan" and params["length"] <= unroll:
            out = _scan(params, given, draw, unroll)
        elif any(part is KEY for part in given):
            out = [KEY] * len(eqn.outvars)
        elif kind == "dynamic_slice":
            out = [_slice(eqn, given)]
        else:
            out = _bind(eqn, given)
        values.update(zip(eqn.outvars, out, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _draws(eqn: Any) -> bool:
    """Returns whether this is a draw in `DRAWS` with one distribution for all its numbers."""
    if eqn.primitive.name not in CALLS or eqn.params.get("name") not in DRAWS:
        return False
    key, *more = (atom.aval for atom in eqn.invars)
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and all(aval.shape == () for aval in more)


def _bind(eqn: Any, given: list[Any]) -> list[Any]:
    """Returns the outputs of one primitive, computed at once if its inputs are known."""
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # as older versions of JAX return it
    with _now_if_known(given):
        out = eqn.primitive.bind(*functions, *given, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def _inside(params: Any) -> tuple[Any, Any]:
    """Returns the jaxpr that a primitive calls, and its constants."""
    inside = params.get("jaxpr") or params.get("call_jaxpr")
    return getattr(inside, "jaxpr", inside), getattr(inside, "consts", ())


def _scan(params: Any, given: list[Any], draw: Draw, unroll: int) -> list[Any]:
    """Returns the outputs of a scan, step by step."""
    inside, length = _inside(params), params["length"]
    if "ft_in" in params:  # from JAX 0.12 on
        held, carried, _ = (len(list(part)) for part in params["ft_in"].update(range(len(given))).unpack())
    else:
        held, carried = params["num_consts"], params["num_carry"]
    consts, carry, rows = given[:held], given[held : held + carried], given[held + carried :]
    order = reversed(range(length)) if params["reverse"] else range(length)
    each: dict[int, list[Any]] = {}
    for i in order:
        now = [_row(x, i) for x in rows]
        out = _evaluate(*inside, [*consts, *carry, *now], draw, unroll)
        carry, each[i] = out[:carried], out[carried:]
    columns = zip(*(each[i] for i in range(length)), strict=True)
    return [*carry, *(_stack(list(column)) for column in columns)]


def _slice(eqn: Any, given: list[Any]) -> Any:
    """Returns a dynamic slice without an index into an array, which converters to ONNX get wrong in batches."""
    x, *starts = given
    for axis, (start, size) in enumerate(zip(starts, eqn.params["slice_sizes"], strict=True)):
        last = x.shape[axis] - size
        if last == 0:
            continue
        with _now_if_known([x, start]):
            if not isinstance(start, jax.core.Tracer):
                first = min(max(int(start), 0), last)
                x = jax.lax.slice_in_dim(x, first, first + size, axis=axis)
            elif size == 1:
                place = jax.lax.broadcasted_iota(start.dtype, x.shape, axis)
                x = jnp.sum(jnp.where(place == jnp.clip(start, 0, last), x, 0), axis, x.dtype, keepdims=True)
            else:
                return _bind(eqn, given)[0]
    return x


def _row(x: Any, i: int) -> Any:
    if x is KEY:
        return KEY
    with _now_if_known([x]):
        return x[i]


def _stack(rows: list[Any]) -> Any:
    if any(row is KEY for row in rows):
        return KEY
    with _now_if_known(rows):
        return jnp.stack(rows)


def _now_if_known(values: list[Any]) -> AbstractContextManager[Any]:
    """Returns a context in which values are computed at once, unless they depend on inputs."""
    known = not any(isinstance(value, jax.core.Tracer) for value in values)
    return jax.ensure_compile_time_eval() if known else nullcontext()
