"""In adjoint matching and the agents that act by it or by edits."""

from dataclasses import replace

import jax.numpy as jnp
import pytest
from tests.planted import bug, wrong

from contraflow.flow import adjoint

ADJOINT = "flow/test_flow_adjoint.py::"


@bug(ADJOINT + "test_the_adjoint_is_the_derivative_of_the_steps_of_the_base")
def the_base_of_an_adjoint_is_one_step_late(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, adjoint, "lean_adjoint")
    def lean_adjoint(right, base, xs, slope):
        h = 1 / (xs.shape[0] - 1)
        return right(lambda x, t: base(x, t + h), xs, slope)


@bug(ADJOINT + "test_the_fixed_point_in_steps")
def the_memoryless_noise_is_half_as_wide(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, adjoint, "sigma")
    def sigma(right, t, h=0.0):
        return 0.5 * right(t, h)


@bug(ADJOINT + "test_the_fixed_point_in_steps")
def the_adjoint_of_the_step_before(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, adjoint, "lean_adjoint")
    def lean_adjoint(right, base, xs, slope):
        found = right(base, xs, slope)
        return replace(found, adjoint=jnp.concatenate([found.adjoint[:1], found.adjoint[:-1]]))
