"""In observations with parts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.planted import bug, wrong

from contraflow.data import augment
from contraflow.envs import episodes
from contraflow.envs.stack import Stacked
from contraflow.flow.model import Flow
from contraflow.nets import encoder
from contraflow.nets.critic import QEnsemble

ENCODER = "nets/test_encoder.py::"
AGENTS = ENCODER + "test_agents_learn_and_act_on_parts"
AUGMENT, SEEN = "data/test_augment.py::", "envs/test_env_pixels.py::"


@bug(ENCODER + "test_sizes_of_the_encoder")
def parts_in_another_order(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, encoder.Encoder, "__call__")
    def call(right, self, obs):
        return jnp.roll(right(self, obs), 2)


@bug(AGENTS + "[sac]")
def the_image_is_ignored(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, encoder.Convolutions, "__call__")
    def call(right, self, image):
        return right(self, jnp.zeros_like(image))


@bug(AGENTS + "[sac]")
def no_gradient_reaches_an_encoder(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, encoder.Encoder, "__call__")
    def call(right, self, obs):
        return right(jax.lax.stop_gradient(self), obs)


@bug(ENCODER + "test_bytes_are_divided_by_255")
def bytes_are_not_divided(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, encoder.Convolutions, "__call__")
    def call(right, self, image):
        return right(self, image * 255.0 if self.part.dtype == "uint8" else image)


@bug(ENCODER + "test_a_flow_encodes_once_for_all_steps_and_particles")
def a_flow_encodes_in_every_step(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Flow, "sample")
    def sample(right, self, x0, cond, key=None, steps=None):
        def step(x, _):
            return x + 0.1 * self.output(x, jnp.zeros(()), cond), None

        return jax.lax.scan(step, x0, length=10)[0]


@bug(AGENTS + "[rfm]")
def critics_encode_for_every_action_of_an_estimator(patch: pytest.MonkeyPatch) -> None:
    def outputs(self, obs, action):
        each = self._each()
        return jnp.stack([member(obs, action) for member in each])

    patch.setattr(QEnsemble, "encode", lambda self, obs: obs)
    patch.setattr(QEnsemble, "outputs", outputs)


@bug(ENCODER + "test_parts_are_kept_in_the_order_of_leaves_and_read_back")
def parts_of_a_spec_in_the_order_given(patch: pytest.MonkeyPatch) -> None:
    from contraflow.core import types

    patch.setattr(types, "sorted", lambda parts, key: parts, raising=False)


@bug(AUGMENT + "test_a_shift_is_a_crop_of_the_padded_image")
def what_leaves_an_image_comes_back_on_the_other_side(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(augment.jnp, "clip", lambda x, low, high: x % (high + 1))


@bug(AUGMENT + "test_shifts_are_uniform_and_independent_of_each_other")
def all_rows_have_one_shift(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, augment.Shifted, "moved")
    def moved(right, self, obs, key):
        by = jr.randint(key, (2,), -self.most, self.most + 1)
        return jax.tree.map(lambda x: jax.vmap(lambda image: augment.shift(image, *by))(x) if x.ndim == 4 else x, obs)


@bug(AUGMENT + "test_shifts_are_uniform_and_independent_of_each_other")
def the_largest_shift_is_never_drawn(patch: pytest.MonkeyPatch) -> None:
    draw = jr.randint
    patch.setattr(augment.jr, "randint", lambda key, shape, low, high: draw(key, shape, low, high - 1))


@bug(SEEN + "test_a_stack_begins_with_its_episode_and_holds_the_last_three_images")
def a_stack_goes_on_across_episodes(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Stacked, "step")
    def step(right, self, state, action, active=None):
        (inner, _), after = right(self, state, action)
        obs = self._pushed(state[1], after.obs[..., :3])
        return (inner, obs), replace(after, obs=obs)


@bug(SEEN + "test_copies_of_a_simulator_that_are_held_keep_their_stack")
def a_copy_that_is_held_loses_its_stack(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Stacked, "step")
    def step(right, self, state, action, active=None):
        (inner, kept), after = right(self, state, action, active)
        if active is not None:
            kept = jax.tree.map(lambda x: np.where(active.reshape(-1, *[1] * (x.ndim - 1)), x, 0 * x), kept)
        return (inner, kept), after


@bug(SEEN + "test_a_pole_that_stands_covers_the_columns_in_its_middle")
def pictures_stand_on_their_head(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, episodes, "image")
    def image(right, shapes, reach, side):
        return right(shapes, reach, side)[::-1]
