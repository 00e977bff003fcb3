"""Random shifts of images: crops of the padded image, uniform, one for all frames of a stack, none for vectors."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contraflow.core.types import Batch
from contraflow.data.augment import Shifted, augmented, shift

MOVE = jax.jit(jax.vmap(shift))


@given(st.integers(0, 2**32 - 1), st.integers(-4, 4), st.integers(-4, 4))
def test_a_shift_is_a_crop_of_the_padded_image(seed: int, down: int, right: int):
    """At (p - down, p - right) of NumPy's own padding with p = 4; bytes remain bytes; by 0 it is the image."""
    image = np.random.default_rng(seed).integers(0, 256, (7, 6, 4), np.uint8)
    found = np.asarray(MOVE(image[None], jnp.array([down]), jnp.array([right])))[0]
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="edge")
    np.testing.assert_array_equal(found, padded[4 - down : 11 - down, 4 - right : 10 - right])
    assert found.dtype == np.uint8 and (down or right or np.array_equal(found, image))


def dots(rows, key, n: int) -> Batch:
    """n rows with a bright pixel in the middle of two frames, a depth image of floats, and a vector."""
    image = jnp.zeros((n, 21, 21, 2), jnp.uint8).at[:, 10, 10].set(255)
    obs = {"view": image, "depth": image[..., :1] / 255.0, "arm": jr.normal(key, (n, 3))}
    zero = jnp.zeros(n)
    return Batch(obs, jnp.zeros((n, 2)), zero, zero, obs, jnp.ones((n, 2)))


def places(x) -> np.ndarray:
    """Shift of each row, down and right, from where its brightest pixel is."""
    flat = np.asarray(x)[..., 0].reshape(len(x), -1).argmax(1)
    return np.stack([flat // 21 - 10, flat % 21 - 10], 1)


def test_shifts_are_uniform_and_independent_of_each_other():
    """Of 4000 rows: each of nine shifts on each axis has its ninth (five standard deviations), and no two of cameras,
    axes, and the two observations go together."""
    batch = jax.jit(lambda k: Shifted(dots, 4)(None, k, 4000))(jr.key(0))
    columns = np.concatenate([places(x[part]) for x in (batch.obs, batch.next_obs) for part in ("view", "depth")], 1)
    for column in columns.T:
        share = np.bincount(column + 4, minlength=9) / 4000
        assert len(share) == 9 and np.abs(share - 1 / 9).max() < 5 * np.sqrt(1 / 9 * 8 / 9 / 4000)
    assert np.abs(np.corrcoef(columns.T) - np.eye(8)).max() < 5 / np.sqrt(4000)
    for x in (batch.obs, batch.next_obs):
        np.testing.assert_array_equal(x["view"][..., 0], x["view"][..., 1], "frames of a stack move together")
        assert x["view"].dtype == jnp.uint8 and x["depth"].dtype == jnp.float32
    mean = np.asarray(batch.obs["view"], float)[..., 0].mean(0) / 255
    np.testing.assert_allclose(mean[6:15, 6:15], 1 / 81, atol=5 * np.sqrt(1 / 81 / 4000))
    assert mean[6:15, 6:15].sum() == pytest.approx(1.0)


def test_vectors_stay():
    plain = dots(None, jr.split(jr.key(1), 3)[0], 8)
    batch = Shifted(dots, 4)(None, jr.clone(jr.key(1)), 8)
    np.testing.assert_array_equal(batch.obs["arm"], plain.obs["arm"])
    assert augmented(dots, 0) is dots
