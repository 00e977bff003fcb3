"""In observations with parts."""

import jax
import jax.numpy as jnp
import pytest
from tests.planted import bug, wrong

from contraflow.flow.model import Flow
from contraflow.nets import encoder
from contraflow.nets.critic import QEnsemble

ENCODER = "nets/test_encoder.py::"
AGENTS = ENCODER + "test_agents_learn_and_act_on_parts"


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
