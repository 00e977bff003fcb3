"""In the server of actions."""

import asyncio

import msgpack
import numpy as np
import pytest
from tests.planted import bug, wrong

from contraflow.core import codec
from contraflow.runtime.policy import Policy
from contraflow.runtime.serve import desk, openpi, request, server, vla_eval, worker
from contraflow.runtime.serve.desk import Desk, Session
from contraflow.runtime.serve.request import Request
from contraflow.runtime.serve.worker import Worker

SERVE = "runtime/test_serve.py::"
CODEC = "runtime/test_serve_codec.py::"


@bug(SERVE + "test_the_same_noise_gives_the_same_bits_whoever_else_asks")
def requests_with_noise_are_computed_with_others(patch: pytest.MonkeyPatch) -> None:
    """The first of a batch gives its noise to all."""
    patch.setattr(Request, "alone", False)


@bug(SERVE + "test_the_actions_are_those_of_the_policy")
def noise_is_ignored(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, worker, "_steer")
    def steer(right, policy, obs, words, noise):
        return worker._act(policy, obs, words)


@bug(SERVE + "test_noise_is_found_within_wrappers")
def noise_is_steered_at_the_raw_observation(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, worker, "ability")
    def ability(right, policy, obs, name):
        return right(policy, obs, name)[0], obs


@bug(SERVE + "test_an_answer_is_a_chunk_in_the_range_of_the_robot")
def actions_leave_in_the_unit_box(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Policy, "raw", lambda self, action: action)


@bug(SERVE + "test_what_is_left_of_a_chunk_is_handed_on")
def a_chunk_is_continued_in_the_range_of_the_robot(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(request, "action_range", lambda spec: (-np.ones(2), np.ones(2)))


@bug(SERVE + "test_requests_that_wait_are_computed_together")
def answers_of_a_batch_are_swapped(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Worker, "_compute")
    def compute(right, self, group):
        return right(self, group)[::-1]


@bug(SERVE + "test_health_answers_while_a_slow_policy_infers")
def inference_blocks_the_server(patch: pytest.MonkeyPatch) -> None:
    def wait(future):
        future.result(10)
        return asyncio.wrap_future(future)

    class Blocking:
        wrap_future = staticmethod(wait)

    patch.setattr(desk, "asyncio", Blocking)


@bug(SERVE + "test_a_session_repeats_its_noise")
def sessions_share_one_count(patch: pytest.MonkeyPatch) -> None:
    count = iter(range(10**9))

    @wrong(patch, Session, "words")
    def words(right, self, seed):
        return *right(self, seed)[:3], next(count)


@bug(SERVE + "test_no_traceback_for_strangers")
def strangers_read_the_message_of_the_policy(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, Desk, "complaint")
    def complaint(right, self, error):
        return f"{right(self, error)} {error}"


@bug(SERVE + "test_the_key")
def any_key_opens(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, server, "admitted")
    def admitted(right, headers, key):
        return "Authorization" in headers or right(headers, key)


@bug(SERVE + "test_a_mistake_is_named_and_others_go_on")
def a_connection_stays_open_after_an_error(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(openpi, "CODE", 1000)


@bug(SERVE + "test_vla_eval")
def a_benchmark_carries_out_whole_chunks(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, vla_eval, "deque")
    def plan(right):
        class All(right):
            def extend(self, actions):
                right.extend(self, [actions])

        return All()


@bug(SERVE + "test_the_broker_takes_a_chunk_action_by_action")
def a_scalar_of_an_answer_is_an_array(patch: pytest.MonkeyPatch) -> None:
    """The broker takes rows of it, of which there are too few."""

    @wrong(patch, openpi, "pack")
    def pack(right, value, *rest):
        return right(value | {"state": np.zeros(3, np.float32)} if "actions" in value else value, *rest)


@bug(CODEC + "test_a_broken_array_is_refused")
def the_sizes_of_arrays_are_taken_on_trust(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, codec, "_array")
    def array(right, data, dtype, shape):
        return np.frombuffer(data, dtype)


@bug(CODEC + "test_lists_that_only_claim_to_be_long_take_no_memory")
def lists_may_be_of_any_length(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(codec, "LIMITS", {})


@bug(CODEC + "test_an_image_is_not_decoded_beyond_its_stated_size")
def images_are_decoded_whatever_their_size(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(codec, "MOST_PIXELS", 10**9)


@bug(CODEC + "test_mutated_frames_are_read_or_refused")
def broken_frames_raise_what_msgpack_raises(patch: pytest.MonkeyPatch) -> None:
    @wrong(patch, codec, "unpack")
    def unpack(right, frame, images=False):
        return msgpack.unpackb(frame)
