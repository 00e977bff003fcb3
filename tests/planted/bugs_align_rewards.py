"""Bugs in rewards of alignment, their processes and their runs."""

import numpy as np
from tests.planted import bug, wrong

from contraflow.core import beside
from contraflow.envs.align import digits, generation, glyphs, reward

ENVS, RUNS = "envs/test_envs_align.py", "train/test_align_runs.py"


@bug(f"{ENVS}::test_a_reward_beside_equals_the_same_reward_in_jax")
def rewards_beside_are_not_weighted_in_order(patch):
    @wrong(patch, generation.Generation, "each_of")
    def each_of(right, self, x, cond):
        return right(self, x, cond)[:, ::-1] * np.arange(1, 1 + len(self.rewards))


@bug(f"{ENVS}::test_a_function_that_jax_can_trace_for_one_sample_is_a_reward_in_jax")
def what_jax_cannot_trace_is_traced_all_the_same(patch):
    @wrong(patch, reward, "own")
    def own(right, name, sizes, trust):
        return reward.Traced(reward.import_path(name, trust))


@bug(f"{ENVS}::test_what_a_reward_beside_does_wrong_is_said")
def a_failed_call_returns_zeros(patch):
    @wrong(patch, beside.Beside, "result")
    def result(right, self, future):
        array, problem = future.result()
        return np.zeros(2) if problem else array


@bug(f"{ENVS}::test_onnx_models_are_rewards")
def an_onnx_model_returns_its_first_class(patch):
    @wrong(patch, reward, "onnx")
    def onnx(right, file, shape, images=None):
        call = right(file, shape, images)
        return lambda x, cond: call(x, np.eye(cond.shape[1], dtype=np.float32)[np.zeros(len(x), int)])


@bug(f"{ENVS}::test_onnx_models_of_glyphs_get_images")
def an_onnx_model_of_glyphs_gets_what_the_flow_ends_in(patch):
    patch.delattr(glyphs.Glyphs, "images")


@bug(f"{ENVS}::test_the_judge_of_digits_approves_of_data_and_of_little_else")
def an_image_is_its_own_nearest_neighbour(patch):
    patch.setattr(digits, "reach", lambda: 0.0)


@bug(f"{RUNS}::test_only_rewards_in_jax_have_a_gradient")
def a_reward_beside_has_a_gradient(patch):
    patch.setattr(generation.Generation, "outside", property(lambda self: False))


@bug(f"{RUNS}::test_a_failing_reward_leaves_no_run")
def rewards_are_not_tried_before_the_run(patch):
    @wrong(patch, generation.Generation, "each_of")
    def each_of(right, self, x, cond):
        return np.zeros((len(x), len(self.rewards)), np.float32) if len(x) == 2 else right(self, x, cond)


@bug("flow/test_flow_guidance.py::test_guidance_moves_and_narrows_a_gaussian")
def guidance_starts_from_the_condition(patch):
    from contraflow.flow.model import Flow

    @wrong(patch, Flow, "output")
    def output(right, self, x, t, cond, r=None):
        out, weight = self.net(*self._inputs(x, t, cond, r)), self.spec.guidance
        return out + weight * (out - self.net(*self._inputs(x, t, 0.0 * cond, r)))
