"""A policy as one file for other programs: (observation, noise) -> action in the range of the environment.

The file holds the whole sampler, the normalisation of observations and the range of actions. Random numbers are an
input (`contraflow.policy.noise`). Nothing is written unless the file acts as the policy does.

- ONNX runs on `onnxruntime` and NumPy alone. jax2onnx converts it (extra `export`).
- StableHLO runs on JAX alone, without this library.
"""

import hashlib
import importlib.util
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.export
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from contraflow.core.bounds import action_range
from contraflow.core.files import read_json, replacing, write_json
from contraflow.core.settings import version
from contraflow.core.types import EnvSpec, UserError
from contraflow.policy.base import inner
from contraflow.policy.noise import UNROLL, WithNoise, with_noise
from contraflow.runtime.policy import Policy

Format = Literal["onnx", "stablehlo"]
LIMIT = 1e-5
"""Largest difference from the policy that is accepted, in units of half the range of an action."""
SLACK = 4.0
"""Accepted multiple of the policy's own rounding error where that is large. Files of trained policies stay below 2."""
RANDOM, EXTREME, CALLS = 64, 16, 200
EXPORTS = "exports"  # in config.json
Inputs = dict[str, np.ndarray]
Run = Callable[[Inputs], np.ndarray]


@dataclass(frozen=True)
class Exported:
    """What was written, how it differs from the policy over `rows` inputs, in units of half the range of an action, and
    the medians in seconds of one action of the policy and of the file.

    `largest` is the largest difference. `parity`, which `LIMIT` bounds, leaves out what float32 does not determine: a
    difference d where the policy's own action moves by r when its inputs change in their last bit counts as
    d LIMIT / max(LIMIT, SLACK r).
    """

    file: Path
    inputs: dict[str, tuple[int, ...]]
    output: tuple[int, ...]
    parity: float
    largest: float
    rows: int
    policy_seconds: float
    file_seconds: float


def export(policy: Policy, folder: Path, to: Format = "onnx", unroll: int = UNROLL) -> Exported:
    """Writes `folder`/policy.onnx or policy.stablehlo for the policy saved in `folder`, and records it in config.json.

    Loops of at most `unroll` steps are unrolled, which is faster and makes a larger file. Raises UserError, and writes
    nothing, if the policy cannot be converted or the file differs from it by more than `LIMIT`.
    """
    cpu = jax.local_devices(backend="cpu")[0]  # accelerators may round factors to fewer bits
    with jax.default_device(cpu), jax.numpy_rank_promotion("allow"):
        network, spec = jax.device_put(policy.network, cpu), policy.spec
        free = with_noise(network, spec.observation, unroll)
        checks = _checks(network, spec, free)
        names = _shapes(spec, free)
        content = (_to_onnx if to == "onnx" else _to_stablehlo)(partial(_act, spec, free), spec, names, policy.env)
        run = (onnx_runner if to == "onnx" else stablehlo_runner)(content)
        each = np.concatenate([_differences(run, spec, check) for check in checks])
        rounding = np.concatenate([check.rounding for check in checks])
        largest, parity = float(each.max()), float(np.max(each * LIMIT / np.maximum(LIMIT, SLACK * rounding)))
        if not parity <= LIMIT:
            raise UserError(
                f"the {to} file would differ from the policy by {parity:.1e} of half the range of an action, and "
                f"{LIMIT:g} is allowed: nothing was written; "
                + ("try --to stablehlo" if to == "onnx" else "serve the policy itself instead")
            )
        one = {name: x[:1] for name, x in checks[0].inputs.items()}
        seconds = _median(lambda: policy.raw(policy(_observation(spec, one)))), _median(lambda: run(one))
    file = folder / f"policy.{to}"
    with replacing(file) as temporary:
        temporary.write_bytes(content)
    about = {
        "file": file.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "policy_sha256": digest(folder / "model.safetensors"),
        "parity": parity,
        "largest": largest,
        "rows": len(each),
        "seconds": {"policy": seconds[0], "file": seconds[1]},
        "inputs": {name: list(shape) for name, shape in names.items()},
        "made_by": {name: _version(name) for name in ("contraflow", "jax", *(("jax2onnx",) if to == "onnx" else ()))},
    }
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {EXPORTS: config.get(EXPORTS, {}) | {to: about}})
    return Exported(file, names, _range(spec)[0].shape, parity, largest, len(each), *seconds)


def onnx_runner(content: bytes) -> Run:
    """Returns a function from named inputs to actions that runs a model on one thread of the processor."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda inputs: np.asarray(session.run(None, inputs)[0])


def stablehlo_runner(content: bytes) -> Run:
    """Returns a function from named inputs to actions."""
    found = jax.export.deserialize(bytearray(content))
    call = jax.jit(found.call)
    return lambda inputs: np.asarray(call(inputs))


def digest(file: Path) -> str:
    """Returns the SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def fresh_exports(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns what config.json says of the exports in a policy folder that are those of its present weights."""
    said = read_json(folder / "config.json").get(EXPORTS, {})
    now = digest(folder / "model.safetensors")
    return {
        to: about
        for to, about in said.items()
        if about["policy_sha256"] == now
        and (folder / about["file"]).is_file()
        and digest(folder / about["file"]) == about["sha256"]
    }


def _act(spec: EnvSpec, free: WithNoise, inputs: dict[str, Any]) -> Any:
    """Returns actions [B, a] or chunks [B, h, a] in the range of the environment, from inputs with leading [B]."""
    low, high = (bound.astype(np.float32) for bound in _range(spec))
    shape = low.shape

    def one(obs, z):
        action = jnp.reshape(free.act(obs, z), shape)
        if not spec.low:
            return action
        return jnp.clip((low + high) / 2 + action * ((high - low) / 2), low, high)

    obs = _observation(spec, inputs)
    if not free.size:
        return jax.vmap(lambda obs: one(obs, jnp.zeros(0)))(obs)
    return jax.vmap(one)(obs, inputs["noise"])


def _range(spec: EnvSpec) -> tuple[np.ndarray, np.ndarray]:
    """Returns the bounds of what one observation yields, [a] or [h, a]."""
    low, high = (np.asarray(bound) for bound in action_range(spec))
    lead = (spec.horizon,) if spec.horizon > 1 else ()
    return np.broadcast_to(low, (*lead, *low.shape)), np.broadcast_to(high, (*lead, *high.shape))


def _shapes(spec: EnvSpec, free: WithNoise) -> dict[str, tuple[int, ...]]:
    """Returns the inputs by name, without the batch: `obs`, or `obs.NAME` for each part, and any `noise`."""
    obs = {f"obs.{part.name}".rstrip("."): part.shape for part in spec.obs_parts} or {"obs": (spec.obs_dim,)}
    return obs | ({"noise": (free.size,)} if free.size else {})


def _observation(spec: EnvSpec, inputs: dict[str, Any]) -> Any:
    """Returns the observation that the inputs hold."""
    return inputs["obs"] if "obs" in inputs else {part.name: inputs[f"obs.{part.name}"] for part in spec.obs_parts}


@dataclass(frozen=True)
class _Check:
    """Inputs, the actions [N, a] of the policy, and how far each row moves when inputs change in their last bit [N]."""

    inputs: Inputs
    wanted: np.ndarray
    rounding: np.ndarray


def _checks(network: Any, spec: EnvSpec, free: WithNoise) -> list[_Check]:
    """Returns what a file is compared with.

    Observations are random within the moments that the policy has recorded, zero, and ten standard deviations to either
    side. The noise is that of random keys, whose actions the policy itself computes, and then far out in its tails.
    """
    rng = np.random.default_rng(0)
    stats = inner(network, "stats")
    mean, std = (0.0, 1.0) if stats is None else (np.asarray(stats.mean), np.sqrt(np.asarray(stats.var)))
    far = rng.choice([-10.0, 10.0], (EXTREME, spec.obs_dim))
    far[0], far[1], far[2] = 0.0, 10.0, -10.0
    units = np.concatenate([rng.standard_normal((RANDOM, spec.obs_dim)), far])
    obs = _split(spec, mean + std * units, units)
    keys = jr.split(jr.key(0), len(units))
    drawn = {"noise": np.array(jax.jit(jax.vmap(free.draw))(jr.clone(keys)))} if free.size else {}
    tails = np.clip(3.0 * rng.standard_normal((len(units), free.size)), -5.0, 5.0).astype(np.float32)
    tails[0] = 0.0

    @jax.jit
    def act(inputs):
        noise = inputs.get("noise", jnp.zeros((len(units), 0)))
        return jax.vmap(free.act)(_observation(spec, inputs), noise)

    def check(inputs: Inputs, wanted: Any) -> _Check:
        at, moved = np.asarray(act(inputs)), np.zeros(len(units))
        for _ in range(8):
            moved = np.maximum(moved, np.abs(np.asarray(act(_nudged(rng, inputs))) - at).max(-1))
        return _Check(inputs, np.asarray(wanted), moved)

    action = jax.jit(jax.vmap(lambda obs, key: network(obs, key, True)))(_observation(spec, obs), keys)
    checks = [check(obs | drawn, action)]
    return [*checks, check(obs | {"noise": tails}, act(obs | {"noise": tails}))] if free.size else checks


def _nudged(rng: np.random.Generator, inputs: Inputs) -> Inputs:
    """Returns the inputs with every float moved up or down by one unit in the last place."""
    return {
        name: x if x.dtype != np.float32 else np.nextafter(x, rng.choice([-np.inf, np.inf], x.shape).astype(np.float32))
        for name, x in inputs.items()
    }


def _split(spec: EnvSpec, flat: np.ndarray, units: np.ndarray) -> Inputs:
    """Returns observations as inputs from their numbers [N, o]; images are spread over their range instead."""
    if not spec.obs_parts:
        return {"obs": flat.astype(np.float32)}
    out, at = {}, 0
    for part in spec.obs_parts:
        now, at = slice(at, at + part.size), at + part.size
        values = np.clip(0.5 + 0.25 * units[:, now], 0, 1) if part.image else flat[:, now]
        values = np.round(255 * values) if part.dtype == "uint8" else values
        out[f"obs.{part.name}".rstrip(".")] = values.reshape(-1, *part.shape).astype(part.dtype)
    return out


def _differences(run: Run, spec: EnvSpec, check: _Check) -> np.ndarray:
    """Returns the difference of each row [N] in units of half the range of an action; of all at once, and of one."""
    low, high = _range(spec)
    whole = run(check.inputs)
    alone = run({name: x[:1] for name, x in check.inputs.items()})
    if whole.shape != (len(check.wanted), *low.shape) or alone.shape != (1, *low.shape):
        return np.full(len(check.wanted), np.inf)

    def unit(action: np.ndarray) -> np.ndarray:
        return ((action.astype(np.float64) - (low + high) / 2) / ((high - low) / 2)).reshape(len(action), -1)

    each = np.abs(unit(whole) - check.wanted).max(-1)
    each[0] = max(each[0], np.abs(unit(alone) - check.wanted[:1]).max())
    return np.where(np.isfinite(each), each, np.inf)


def _to_stablehlo(act: Callable[..., Any], spec: EnvSpec, names: dict[str, tuple[int, ...]], env: str) -> bytes:
    _need("flatbuffers", "StableHLO")
    (b,) = jax.export.symbolic_shape("b")
    like = {name: jax.ShapeDtypeStruct((b, *shape), _dtype(spec, name)) for name, shape in names.items()}
    return bytes(jax.export.export(jax.jit(act), platforms=("cpu", "cuda", "tpu"))(like).serialize())


def _to_onnx(act: Callable[..., Any], spec: EnvSpec, names: dict[str, tuple[int, ...]], env: str) -> bytes:
    for name in ("jax2onnx", "onnx", "onnxruntime"):
        _need(name, "ONNX")
    for name in ("jax2onnx", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of jax2onnx about its own parts
        import jax2onnx
        import onnx.helper

        shapes = [jax.ShapeDtypeStruct(("B", *shape), _dtype(spec, name)) for name, shape in names.items()]
        try:
            model = jax2onnx.to_onnx(
                lambda *inputs: act(dict(zip(names, inputs, strict=True))),
                shapes,
                model_name="policy",
                input_names=list(names),
                output_names=["action"],
            )
        except Exception as error:  # jax2onnx raises what it likes for an operation that it does not know
            raise UserError(f"jax2onnx cannot convert this policy ({error}): try --to stablehlo") from None
    about = {"env": env, "horizon": spec.horizon, "execute": spec.execute, "made_by": f"contraflow {version()}"}
    onnx.helper.set_model_props(model, {key: str(value) for key, value in about.items()})
    return model.SerializeToString()


def _need(package: str, for_what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f'{for_what} files need {package}: pip install "contraflow[export]"')


def _dtype(spec: EnvSpec, name: str) -> str:
    return {f"obs.{part.name}".rstrip("."): part.dtype for part in spec.obs_parts}.get(name, "float32")


def _version(package: str) -> str:
    import importlib.metadata

    return version() if package == "contraflow" else importlib.metadata.version(package)


def _median(call: Callable[[], Any]) -> float:
    """Returns the median of the seconds that a call takes."""
    taken = []
    for i in range(10 + CALLS):
        start = time.perf_counter()
        call()
        if i >= 10:
            taken.append(time.perf_counter() - start)
    return float(np.median(taken))
