"""Problems of alignment, their judges, and rewards of the user's own."""

from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from contraflow.core.beside import Beside
from contraflow.core.types import UserError
from contraflow.envs import align, close, make
from contraflow.envs.align import Generation, digits
from contraflow.envs.align.generation import Reward
from contraflow.envs.align.reward import Traced, onnx, own

MINE = "tests.envs.test_envs_align"


# rewards of the user's own; the helpers below name them as `module:function`


def first(x, cond):
    return 2.0 * x[0]


def first_of_arrays(x, cond):
    return 2.0 * np.asarray(x)[:, 0]


def any_axis(x, cond):
    return (x * 2).mean(-1)


def says_host(x, cond):
    assert type(x) is np.ndarray and x.ndim == 2
    return x.sum(-1)


says_host.host = True


def broken(x, cond):
    return np.asarray(x)[:, 99]


def matrix(x, cond):
    return np.asarray(x)


def infinite(x, cond):
    return np.full(len(np.asarray(x)), np.inf)


def quits(x, cond):
    import os

    if isinstance(x, np.ndarray):
        os._exit(1)
    raise ValueError


number = 3


def problem(*names: str, weights: tuple[float, ...] = ()) -> Generation:
    env = make("align:mixture2d")
    assert isinstance(env, Generation)
    found = align.rewards(env.problem, names, "tests")
    return Generation(env.problem, found, weights or (1.0,) * len(found), num_envs=5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("first", Traced), ("any_axis", Traced), ("first_of_arrays", Beside), ("says_host", Beside), ("broken", Beside)],
)
def test_a_function_that_jax_can_trace_for_one_sample_is_a_reward_in_jax(name: str, kind: type):
    assert type(own(f"{MINE}:{name}", (2, 1), "tests")) is kind


def test_a_reward_beside_equals_the_same_reward_in_jax():
    x, cond = np.asarray(jr.uniform(jr.key(0), (7, 2), minval=-1)), np.zeros((7, 1), np.float32)
    env = problem(f"{MINE}:first", f"{MINE}:first_of_arrays", "right", weights=(1.0, 0.5, 0.25))
    try:
        each = env.each_of(x, cond)
        np.testing.assert_array_equal(each, np.repeat(2.0 * x[:, :1], 3, 1))
        assert env.outside and not env.spec.jittable and len(env.notes) == 1 and "trace" in env.notes[0]
        state, obs = env.reset(jr.key(1))
        again = jr.clone(state[0]), state[1]
        action = jnp.linspace(-2.0, 2.0, 10).reshape(5, 2)  # beyond [-1, 1], where samples are clipped
        after = env.step(state, action)[1]
        np.testing.assert_allclose(after.reward, 1.75 * 2.0 * jnp.clip(action, -1, 1)[:, 0], rtol=1e-6)
        inside = problem("right").step(again, action)[1]
        np.testing.assert_array_equal(after.success, inside.success)
        np.testing.assert_array_equal(after.next_obs, obs)
    finally:
        close(env)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("broken", ["IndexError", "index 99", "could not trace"]),
        ("matrix", ["(2, 2) for 2 samples", "one number for each"]),
        ("infinite", ["not finite"]),
        ("quits", ["ended without an answer", "__main__"]),
    ],
)
def test_what_a_reward_beside_does_wrong_is_said(name: str, words: list[str]):
    env = problem(f"{MINE}:{name}")
    try:
        with pytest.raises(UserError) as error:
            env.each_of(np.zeros((2, 2)), np.zeros((2, 1)))
    finally:
        close(env)
    assert all(word in str(error.value) for word in [f"{MINE}:{name}", *words])


@pytest.mark.parametrize(
    ("name", "trust", "words"),
    [
        ("rigth", "", "did you mean 'right'"),
        (f"{MINE}:first", "", "--trust tests.envs.test_envs_align"),
        (f"{MINE}:nowhere", "tests", "cannot import"),
        (f"{MINE}:number", "tests", "is no function but a int"),
        ("onnx:nowhere.onnx", "", "there is no file"),
    ],
)
def test_unknown_rewards_are_refused(name: str, trust: str, words: str):
    with pytest.raises(UserError, match=words):
        align.rewards(make("align:mixture2d").problem, (name,), trust)  # pyright: ignore[reportAttributeAccessIssue]


def model(file: Path, op: str, inputs: dict[str, list], **attributes) -> str:
    """Writes an ONNX model of one operation on floats."""
    onnx = pytest.importorskip("onnx")
    tensor = lambda name, shape: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
    node = onnx.helper.make_node(op, list(inputs), ["out"], **attributes)
    parts = [tensor(*item) for item in inputs.items()], [tensor("out", ["n", 4])]
    graph = onnx.helper.make_graph([node], "graph", *parts)
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    file.write_bytes(made.SerializeToString())
    return str(file)


def test_onnx_models_are_rewards(tmp_path):
    pytest.importorskip("onnxruntime")
    rng, file = np.random.default_rng(0), tmp_path / "model.onnx"
    x, cond = rng.normal(size=(5, 4)).astype(np.float32), np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0]]
    picked = x[np.arange(5), cond.argmax(1)]
    read = onnx(model(file, "Exp", {"x": ["n", 4]}), ())
    np.testing.assert_allclose(read(x, cond), np.exp(picked), rtol=1e-6)
    read = onnx(model(file, "Mul", {"x": ["n", 4], "c": ["n", 4]}), ())  # conditions are a second input
    np.testing.assert_allclose(read(x, cond), picked, rtol=1e-6)
    for images in (["n", 1, 2, 2], ["n", 2, 2, 1], ["n", 2, 2]):
        read = onnx(model(file, "Flatten", {"x": images}, axis=1), (2, 2))
        np.testing.assert_array_equal(read(x, cond), picked)


class WithoutOcr(align.Glyphs):
    """Glyphs with the reward that needs no package, and no judge."""

    @property
    def rewards(self):
        return {"ink": align.glyphs.ink}

    def approved(self, x, cond):
        return True


@pytest.mark.parametrize("inputs", [["n", 784], ["n", 1, 28, 28]])
def test_onnx_models_of_glyphs_get_images(inputs: list, tmp_path):
    """A model that returns its first pixel: that of the decoded sample, which differs from all coordinates."""
    pytest.importorskip("onnxruntime")
    file, kind = model(tmp_path / "model.onnx", "Flatten", {"x": inputs}, axis=1), WithoutOcr()
    x = np.random.default_rng(0).uniform(-1, 1, (3, 96)).astype(np.float32)
    (found,) = align.rewards(kind, (f"onnx:{file}",))
    assert isinstance(found, Beside)
    first = onnx(*found._args)(x, np.zeros((3, 20), np.float32))  # in this process
    np.testing.assert_allclose(first, align.glyphs.decode(x)[:, 0], atol=1e-5)
    assert np.abs(np.asarray(first)[:, None] - x).min() > 1e-3


# digits


def test_the_classifiers_know_images_that_they_were_not_trained_on():
    pytest.importorskip("sklearn")
    x, y = digits.images()
    for judge in (False, True):
        named = np.asarray(jax.vmap(digits.classifier(judge))(jnp.asarray(x))).argmax(1)
        assert (named == y)[judge::2].mean() > 0.99
        assert (named == y)[1 - judge :: 2].mean() > 0.95  # .972 and .978


def test_the_judge_of_digits_approves_of_data_and_of_little_else():
    pytest.importorskip("sklearn")
    kind = digits.Digits()
    cond, x = map(jnp.asarray, kind.data())
    good = np.asarray(jax.vmap(kind.approved)(x, cond))
    assert good.mean() > 0.98
    # An image lies at distance 0 of itself; among all others, 99 % have one within reach.
    squares = np.array(jnp.sum(x**2, 1)[:, None] + jnp.sum(x**2, 1)[None] - 2 * x @ x.T)
    np.fill_diagonal(squares, np.inf)
    assert np.mean(squares.min(1) <= digits.reach() ** 2) == pytest.approx(0.99, abs=0.002)
    wrong = jnp.roll(cond, 1, axis=1)
    assert np.asarray(jax.vmap(kind.approved)(x, wrong)).mean() < 0.02
    noise = jr.uniform(jr.key(0), x.shape, minval=-1, maxval=1)
    assert np.asarray(jax.vmap(kind.approved)(noise, cond)).mean() == 0.0
    blur = jnp.broadcast_to(jnp.mean(x, 0), x.shape)
    assert np.asarray(jax.vmap(kind.approved)(blur, cond)).mean() < 0.11  # one class of ten at most


def test_the_judge_of_the_mixture_approves_of_data():
    kind = make("align:mixture2d").problem  # pyright: ignore[reportAttributeAccessIssue]
    cond, x = map(jnp.asarray, kind.data())
    assert np.asarray(jax.vmap(kind.approved)(x, cond)).mean() == pytest.approx(1 - np.exp(-6.0), abs=0.001)
    assert not kind.approved(jnp.array([1.0, 0.0]), cond[0]) and not kind.approved(jnp.zeros(2), cond[0])


def test_rewards_are_functions_of_one_sample():
    for name in ("mixture2d", "digits"):  # those of glyphs run outside of JAX, and need a package
        kind = align.PROBLEMS[name]
        one = [jax.ShapeDtypeStruct((n,), jnp.float32) for n in kind.sizes]
        for reward in kind.rewards.values():
            function: Reward = reward  # pyright: ignore[reportAssignmentType]
            if not isinstance(function, Beside):
                assert jax.eval_shape(function, *one).shape == ()


def test_two_ocr_models_read_the_glyphs():
    """In this process: the functions that run beside it."""
    glyphs = align.glyphs
    try:
        read, judge = glyphs.recogniser(glyphs._file(glyphs.REWARD)), glyphs.judge(glyphs._file(glyphs.JUDGE))
    except UserError as missing:
        pytest.skip(str(missing))
    cond, x = (rows[:100] for rows in glyphs.Glyphs().data())
    others = np.roll(cond, 1, 0)
    assert read(x, cond).mean() > -0.1 and judge(x, cond).mean() > 0.9
    assert read(x, others).mean() < -5.0 and judge(x, others).mean() < 0.1
    noise = np.random.default_rng(0).uniform(-1, 1, x.shape).astype(np.float32)
    assert read(noise, cond).mean() < -3.0 and judge(noise, cond).mean() < 0.1
