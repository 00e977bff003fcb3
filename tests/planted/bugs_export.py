"""In exported and shared policies."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.planted import bug, wrong

from contraflow.policy import noise
from contraflow.runtime import export, hub
from contraflow.training import run_writer

NOISE = "policy/test_noise.py::"
EXPORT = "runtime/test_export.py::"
HUB = "runtime/test_hub.py::"


@bug(NOISE + "test_the_action_of_a_key_is_that_of_its_noise")
def the_best_candidate_is_always_the_first(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, noise, "_slice")
    def cut(right, eqn, given):
        return right(eqn, [given[0], *(jnp.zeros((), jnp.int32) for _ in given[1:])])


@bug(NOISE + "test_the_action_of_a_key_is_that_of_its_noise")
def unrolled_steps_run_backwards(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, noise, "_scan")
    def scan(right, params, *rest):
        return right({**params, "reverse": not params["reverse"]}, *rest)


@bug(NOISE + "test_the_noise_of_random_keys_is_normal")
def uniform_numbers_are_not_made_normal(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(noise.DRAWS, "_uniform", (lambda z, low, high: z, lambda u, low, high: u))


@bug(EXPORT + "test_a_file_that_differs_is_not_written")
def a_batch_is_compared_by_its_first_row(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, export, "_differences")
    def differences(right, run, spec, check):
        return right(run, spec, check)[:1] * np.ones(len(check.wanted))


@bug(EXPORT + "test_a_file_that_differs_is_not_written")
def a_difference_that_is_no_number_passes(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, export, "_differences")
    def differences(right, *args):
        return np.where(np.isinf(found := right(*args)), 0.0, found)


@bug(EXPORT + "test_what_float32_does_not_determine_is_allowed")
def rounding_excuses_everything(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(export, "SLACK", 1e9)


@bug(EXPORT + "test_a_file_acts_as_the_policy_in_the_range_of_the_robot")
def a_file_acts_in_the_range_of_the_policy(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, export, "_range")
    def unit(right, spec):
        low, high = right(spec)
        return -np.ones_like(low), np.ones_like(high)


@bug(HUB + "test_no_code_is_taken")
def every_file_of_a_folder_is_taken(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, hub, "pull")
    def pull(right, source, folder):
        shutil.copytree(source, folder)
        return []


@bug(HUB + "test_the_tensors_of_lerobot_give_the_same_actions")
def variances_are_shared_as_deviations(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, hub, "save_file")
    def save(right, arrays, path):
        return right({k: v**2 if k.endswith(".std") else v for k, v in arrays.items()}, path)


@bug(HUB + "test_exports_are_shared_while_they_are_of_these_weights")
def exports_of_earlier_weights_are_shared(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, hub, "fresh_exports")
    def exports(right, folder):
        return hub.read_json(folder / "config.json").get("exports", {})


@bug("train/test_provenance.py::test_a_row_names_its_policy")
def a_revision_is_that_of_the_settings(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, run_writer, "revision")
    def revision(right, policy):
        return right(jax.tree.map(jnp.zeros_like, policy))
