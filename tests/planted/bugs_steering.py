"""In agents that act beside or through a frozen policy."""

from dataclasses import replace

import jax.numpy as jnp
import pytest
from tests.planted import bug, wrong

from contraflow.agents.online.dsrl import DSRL
from contraflow.flow.targets import log_normal
from contraflow.policy import noise
from contraflow.policy.noise import Prior, Steered

DSRL_TESTS = "agents/test_dsrl.py::"


@bug(DSRL_TESTS + "test_the_prior_form_reaches_the_tilt_of_the_noise")
def the_prior_of_the_noise_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Prior, "draw")
    def draw(right, self, out, key):
        w, _ = right(self, out, key)
        return w, log_normal(w, *noise.moments(out))


@bug(DSRL_TESTS + "test_noise_is_valued_by_the_action_that_it_leads_to")
def noise_is_valued_by_the_action_of_no_noise(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Steered, "act")
    def act(right, self, obs, w):
        return right(self, obs, 0.0 * w)


@bug(DSRL_TESTS + "test_the_frozen_policy_never_changes")
def the_frozen_policy_is_trained(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, DSRL, "update")
    def update(right, self, state, batch, key):
        state, metrics = right(self, state, batch, key)
        base = state.base
        last = replace(base.net.last, bias=base.net.last.bias - 1e-4 * jnp.ones_like(base.net.last.bias))
        return replace(state, base=replace(base, net=replace(base.net, last=last))), metrics
