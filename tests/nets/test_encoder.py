"""Observations with parts, by closed forms: sizes, order, bytes, and that every network encodes once."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.contract.cases import FAMILIES, FLOW, FOREIGN, TABLE, Case
from tests.train.pixel_helpers import PARTS, batch_of

from contraflow.core.flatten import ordered_leaves
from contraflow.core.observation import Part, blank, misfit
from contraflow.core.settings import from_json, to_json
from contraflow.core.types import Batch, EnvSpec, Rollout, UserError
from contraflow.flow.coupling import ConditionalOT
from contraflow.nets.critic import Critic
from contraflow.nets.encoder import Encoder, Pixels, encode, encoder_for, patches
from contraflow.nets.mlp import MLP
from contraflow.policy.artifact import load_policy, save_policy
from contraflow.rl.normalise import initial_moments

SMALL = Pixels((7, 5), (2, 1), features=6)  # sizes that no other layer has
SPEC = EnvSpec(258, 2, 4, 10, True, obs_parts=PARTS)
WEIGHTS = {(9, 7), (63, 5)}


# an observation


def test_parts_are_kept_in_the_order_of_leaves_and_read_back():
    parts = Part("view", (4, 4, 1), "uint8"), Part("10", (2,)), Part("2", (3,))
    spec = EnvSpec(21, 1, 1, None, False, obs_parts=parts)
    assert [part.name for part in spec.observation] == ["10", "2", "view"]
    assert [x.shape for x in ordered_leaves(blank(spec.observation))] == [(2,), (3,), (4, 4, 1)]
    assert from_json(to_json(spec), EnvSpec) == spec and hash(spec) == hash(replace(spec))
    assert EnvSpec(5, 1, 1, None, False).observation == 5
    alone = EnvSpec(16, 1, 1, None, False, obs_parts=(Part("", (4, 4, 1)),))
    assert blank(alone.observation, 3).shape == (3, 4, 4, 1)


def test_specs_that_contradict_themselves_are_refused():
    with pytest.raises(ValueError, match="258 numbers, obs_dim says 5"):
        EnvSpec(5, 1, 1, None, False, obs_parts=PARTS)
    with pytest.raises(ValueError, match="different names"):
        EnvSpec(4, 1, 1, None, False, obs_parts=(Part("a", (2,)), Part("a", (2,))))
    for shape, dtype in (((4, 4), "float32"), ((3,), "uint8")):
        with pytest.raises(ValueError, match="height, width, channels"):
            Part("x", shape, dtype)


def test_what_does_not_fit_is_named():
    obs = jax.tree.map(np.asarray, batch_of(np.random.default_rng(0), 3))
    assert misfit(PARTS, obs, 3) is None
    assert "image, state are needed" in (misfit(PARTS, {"image": obs["image"]}, 3) or "")
    assert "no parts" in (misfit(PARTS, obs["state"], 3) or "")
    assert "state of shape (2, 2)" in (misfit(PARTS, obs | {"state": obs["state"][:2]}, 3) or "")
    assert "float32 where" in (misfit(PARTS, obs | {"image": np.float32(obs["image"])}, 3) or "")


# the encoder


@pytest.mark.parametrize(("side", "left"), [(84, 35), (64, 25), (16, 1)])
def test_the_default_leaves_what_the_papers_have(side, left):
    """84 x 84 becomes 35 x 35, the 32 * 35 * 35 numbers of DrQ-v2's encoder; n -> (n - 3) // 2 + 1 - 2 - 2 - 2."""
    assert Pixels().grid(side, side) == (left, left) == ((side - 3) // 2 + 1 - 6,) * 2


def test_sizes_of_the_encoder():
    shapes = jax.eval_shape(lambda k: Encoder(PARTS, SMALL, key=k), jr.key(0))
    (net, none), ((h, w),) = shapes.images, [SMALL.grid(16, 16)]
    assert none is None and (h, w) == (5, 5)
    assert [layer.weight.shape for layer in net.layers] == [(9, 7), (63, 5)]
    assert net.last.weight.shape == (h * w * 5, 6)
    encoder, size = encoder_for(PARTS, SMALL, jr.key(0))
    obs = jax.tree.map(lambda x: x[0], batch_of(np.random.default_rng(0), 1))
    out = encode(encoder, obs)
    assert out.shape == (size,) == (6 + 2,) and np.abs(out[:6]).max() <= 1
    np.testing.assert_array_equal(out[6:], obs["state"])  # the order of leaves: image, state
    assert encode(encoder, out) is out and encoder_for(5, SMALL, jr.key(0)) == (None, 5)
    assert encode(None, obs["state"]) is obs["state"]


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (4, 3)])
def test_patches_are_a_convolution(kernel, stride):
    x, w = jr.normal(jr.key(0), (11, 9, 2)), jr.normal(jr.key(1), (kernel, kernel, 2, 5))
    layout = ("NHWC", "HWIO", "NHWC")
    want = jax.lax.conv_general_dilated(x[None], w, (stride, stride), "VALID", dimension_numbers=layout)[0]
    np.testing.assert_allclose(patches(x, kernel, stride) @ w.reshape(-1, 5), want, atol=1e-5)


def test_bytes_are_divided_by_255():
    encoder = Encoder(PARTS, SMALL, key=jr.key(0))
    floats = Encoder((replace(PARTS[0], dtype="float32"), PARTS[1]), SMALL, key=jr.key(0))
    obs = jax.tree.map(lambda x: x[0], batch_of(np.random.default_rng(1), 1))
    np.testing.assert_allclose(encoder(obs), floats(obs | {"image": obs["image"] / 255.0}), atol=1e-6)
    assert not np.allclose(encoder(obs), encoder(obs | {"image": 255 - obs["image"]}), atol=1e-3)


def test_images_without_room_and_bad_settings_are_refused():
    with pytest.raises(UserError, match=r"8 x 16 are too small .* pixels\.strides"):
        Pixels().grid(8, 16)
    for bad in ({"strides": (2, 1)}, {"channels": (0, 1, 1, 1)}, {"kernel": 0}, {"features": 0}):
        with pytest.raises(ValueError, match=r"Pixels|features|kernel"):
            Pixels(**bad)
    for mode in ("running", "frozen"):
        with pytest.raises(UserError, match=r"image \[16, 16, 1\] uint8 \+ state .* off"):
            initial_moments(mode, SPEC)
    with pytest.raises(UserError, match="Independent"):
        ConditionalOT()(jnp.ones((2, 1)), jnp.ones((2, 1)), batch_of(np.random.default_rng(0), 2))


# a vector costs nothing more


def test_a_vector_in_a_dict_is_the_plain_vector():
    """The same weights, and the same numbers bit by bit: actions of a flow, values of a critic, outputs of an MLP."""
    part, x, a = (Part("only", (3,)),), jr.normal(jr.key(1), (3,)), jnp.ones(2)
    plain, parts = (FLOW.init(jr.key(0), 2, size) for size in (3, part))
    critics = [Critic(size, 2, 8, 1, key=jr.key(2)) for size in (3, part)]
    mlps = [MLP(size, 2, 8, 1, more=2, key=jr.key(3)) for size in (3, part)]
    for one, other in ((plain, parts), *((c, d) for c, d in (critics, mlps))):
        assert jax.tree.all(jax.tree.map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))
        assert one.encoder is None and other.encoder is not None
    obs, x0 = {"only": x}, jr.normal(jr.key(4), (2,))
    np.testing.assert_array_equal(plain.sample(x0, x), parts.sample(x0, obs))
    np.testing.assert_array_equal(critics[0](x, a), critics[1](obs, a))
    np.testing.assert_array_equal(mlps[0](x, a), mlps[1](obs, a))


def test_ppo_learns_the_same_from_a_vector_in_a_dict():
    """Values of observations with parts are computed step by step, those of vectors all at once."""
    rng, (t, n) = np.random.default_rng(0), (3, 4)
    x, after = (jnp.asarray(rng.standard_normal((t, n, 3)), jnp.float32) for _ in range(2))
    reward, no = jnp.asarray(rng.standard_normal((t, n)), jnp.float32), jnp.zeros((t, n), bool)
    agent, actors = with_pixels(TABLE["ppo"]), []
    for parts, wrap in (((), lambda x: x), ((Part("only", (3,)),), lambda x: {"only": x})):
        state = agent.init(jr.key(0), EnvSpec(3, 2, n, 10, True, obs_parts=parts))
        act = jax.vmap(jax.vmap(agent.policy(state).sample))
        extras = jax.jit(act)(wrap(x), jr.split(jr.key(1), (t, n)))[1]
        rollout = Rollout(wrap(x), extras, reward, wrap(after), no, no, ~no)
        state = jax.jit(agent.update)(state, rollout, jr.key(2))[0]
        actors.append(jax.tree.leaves((state.actor, state.critic)))
    for one, other in zip(*actors, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


# once per observation


def encodings(jaxpr: Any, looped: bool = False) -> list[bool]:
    """For each first layer of an encoder in a jaxpr, whether it stands within a loop."""
    found = []
    for eqn in jaxpr.eqns:
        shapes = {tuple(getattr(v.aval, "shape", ())[-2:]) for v in eqn.invars}
        if eqn.primitive.name == "dot_general" and (9, 7) in shapes:
            found.append(looped)
        inside = looped or eqn.primitive.name in ("scan", "while")
        for param in eqn.params.values():
            for sub in param if isinstance(param, tuple | list) else (param,):
                inner = getattr(sub, "jaxpr", sub)
                if hasattr(inner, "eqns"):
                    found += encodings(inner, inside)
    return found


def test_the_counter_counts():
    flow = replace(FLOW, pixels=SMALL).init(jr.key(0), 2, PARTS)
    obs = jax.tree.map(lambda x: x[0], batch_of(np.random.default_rng(0), 1))

    def looped(obs):
        return jax.lax.scan(lambda c, _: (c + flow.encode(obs)[0], None), 0.0, length=3)[0]

    assert encodings(jax.make_jaxpr(flow.encode)(obs).jaxpr) == [False]
    assert encodings(jax.make_jaxpr(looped)(obs).jaxpr) == [True]


def test_a_flow_encodes_once_for_all_steps_and_particles():
    from contraflow.flow.model import Ddim
    from contraflow.flow.solver import Euler

    obs = jax.tree.map(lambda x: x[0], batch_of(np.random.default_rng(0), 1))
    for solver in (Ddim(10), Euler(10)):
        flow = replace(FLOW, solver=solver, pixels=SMALL).init(jr.key(0), 2, PARTS)
        jaxpr = jax.make_jaxpr(lambda o, k, flow=flow: flow.particles(o, k, 32))(obs, jr.key(1)).jaxpr
        assert encodings(jaxpr) == [False]
        x0 = flow.noise(jr.key(2), 32)
        jaxpr = jax.make_jaxpr(lambda o, x, flow=flow: jax.vmap(lambda x: flow.sample(x, o))(x))(obs, x0).jaxpr
        assert encodings(jaxpr) == [False]


def with_pixels(settings: Any) -> Any:
    """The settings of an agent with small encoders wherever there is one, and without normalisation."""
    if not is_dataclass(settings):
        return settings
    parts = {f.name: with_pixels(getattr(settings, f.name)) for f in fields(settings) if f.init}
    small = {"pixels": SMALL, "normalise_obs": "off"}
    return replace(settings, **parts | {name: value for name, value in small.items() if name in parts})


NAMES = [
    name if name in ("rfm", "sac", "ppo", "bc") else pytest.param(name, marks=pytest.mark.slow)
    for name in TABLE
    if name not in FOREIGN
]
assert set(FAMILIES) <= set(TABLE)


@pytest.mark.parametrize("name", NAMES)
def test_agents_learn_and_act_on_parts(name, tmp_path):
    """Two updates are finite and move every encoder that learns; actions see both parts; no encoder in a loop."""
    agent = with_pixels(TABLE[name])
    case, rng = Case(name, agent), np.random.default_rng(0)
    state = agent.init(jr.key(0), SPEC)
    obs, after, n = batch_of(rng, 8), batch_of(rng, 8), 8
    zero, action = jnp.zeros(n), jnp.asarray(rng.uniform(-1, 1, (n, 2)), jnp.float32)

    def rows(policy: Any) -> Any:
        if not case.onpolicy:
            return Batch(obs, action, zero + 1, zero + 0.9, after, jnp.ones((n, 2)))
        extras = jax.vmap(policy.sample)(obs, jr.split(jr.key(1), n))[1]
        fold = lambda tree: jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), tree)
        no = jnp.zeros((2, 4), bool)
        reward = jnp.asarray(rng.standard_normal((2, 4)), jnp.float32)
        return Rollout(fold(obs), fold(extras), reward, fold(after), no, no, ~no)

    data = jax.jit(rows)(agent.policy(state))
    before, init_policy = jax.tree.map(jnp.copy, state), agent.policy(agent.init(jr.key(0), SPEC))
    if not case.onpolicy:  # those walk through minibatches in a loop
        found = encodings(jax.make_jaxpr(agent.update)(state, data, jr.key(2)).jaxpr)
        assert found and not any(found)
    for i in range(2):
        state, metrics = case.update(state, data, jr.key(2 + i))
        assert all(np.isfinite(value) for value in metrics.values())
    for part in ("actor", "flow", "critic"):
        pairs = zip(jax.tree.leaves(getattr(before, part, ())), jax.tree.leaves(getattr(state, part, ())), strict=True)
        moves = [float(np.abs(a - b).max()) for a, b in pairs if a.shape[-2:] in WEIGHTS]
        assert all(move > 1e-4 for move in moves), part
        assert moves or not hasattr(state, part) or name == "sir", part
    policy = agent.policy(state)
    one = jax.tree.map(lambda x: x[0], obs)
    found = encodings(jax.make_jaxpr(lambda p, o, k: p(o, k, False))(policy, one, jr.key(5)).jaxpr)
    assert found and not any(found) and len(found) <= 4
    act = jax.jit(lambda p, o: jax.vmap(lambda o, k: p(o, k, True))(o, jr.split(jr.key(6), n)))
    actions = act(policy, obs)
    assert actions.shape == (n, 2) and np.isfinite(actions).all()
    for part in ("image", "state"):
        assert not np.array_equal(actions, act(policy, obs | {part: after[part]})), part
    save_policy(tmp_path / "policy", policy, SPEC, "toy:env")
    again, spec, _ = load_policy(tmp_path / "policy")
    assert spec == SPEC and jax.tree.structure(again) == jax.tree.structure(init_policy)
    np.testing.assert_array_equal(act(again, obs), actions)
