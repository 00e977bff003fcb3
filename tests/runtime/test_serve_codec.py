"""Frames: what the clients' own codecs write is read, what is broken is refused, and by no other error."""

import sys

import msgpack
import numpy as np
import pytest
from tests.runtime.serve_helpers import mutations

from contraflow.core.codec import KINDS, pack, unpack
from contraflow.core.types import UserError

ARRAYS = {
    "row": np.array([[0, 1, 1]]),
    "nothing": np.zeros((0, 3)),
    "a number": np.array(1),
    "every second": np.arange(12).reshape(3, 4)[:, ::2] % 2,
    "columns first": np.asfortranarray(np.array([[0, 1], [1, 1]])),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("order", ["<", ">"])
def test_arrays_of_openpi_arrive(name: str, kind: str, order: str):
    theirs = pytest.importorskip("openpi_client.msgpack_numpy")
    array = ARRAYS[name].astype(order + kind)
    found = unpack(theirs.packb({"x": array, "name": "prompt"}))
    assert found["name"] == "prompt" and found["x"].dtype == array.dtype.newbyteorder("=")
    assert np.array_equal(found["x"], array) and found["x"].shape == array.shape
    back = theirs.unpackb(pack({"x": array}))["x"]
    assert back.dtype == array.dtype and np.array_equal(back, array)


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_arrays_of_vla_eval_arrive(name: str, kind: str):
    theirs = pytest.importorskip("vla_eval.protocol.messages")
    array = ARRAYS[name].astype(kind)
    message = theirs.Message(theirs.MessageType.OBSERVATION, {"x": array}, seq=3)
    found = unpack(theirs.pack_message(message))
    assert found["type"] == "observation" and found["seq"] == 3
    assert found["payload"]["x"].dtype == array.dtype and np.array_equal(found["payload"]["x"], array)
    frame = pack({"type": "action", "payload": {"x": array}, "seq": 4, "timestamp": 0.0}, text_keys=True)
    back = theirs.unpack_message(frame).payload["x"]
    assert back.dtype == array.dtype and np.array_equal(back, array) and back.shape == array.shape


def test_scalars_of_numpy():
    theirs = pytest.importorskip("openpi_client.msgpack_numpy")
    sent = {"a": np.float32(1.5), "b": np.bool_(True), "c": np.int64(-3), "d": np.str_("pick up")}
    found = unpack(theirs.packb(sent))
    assert found == {"a": 1.5, "b": True, "c": -3, "d": "pick up"} and found["a"].dtype == np.float32
    assert theirs.unpackb(pack({"a": sent["a"]})) == {"a": 1.5}
    assert msgpack.unpackb(pack(sent["c"], text_keys=True)) == -3


@pytest.mark.parametrize("form", ["png", "jpeg", "raw"])
def test_images_of_vla_eval(form: str):
    theirs = pytest.importorskip("vla_eval.protocol.image_codec")
    image = np.full((6, 5, 3), 200, np.uint8)
    if form != "jpeg":
        image[2, 1] = 3, 2, 1
    coded = theirs.encode_image(image, form)
    found = unpack(msgpack.packb(coded), images=True)
    np.testing.assert_allclose(found, image, atol=2 if form == "jpeg" else 0)
    assert isinstance(unpack(msgpack.packb(coded)), dict), "images are read on request only"
    for wrong in ({"shape": [6, 5, 1]}, {"shape": [5, 6, 4]}, {"data": b"\x89PNG"}, {"format": "gif"}, {"shape": 3}):
        with pytest.raises(UserError):
            unpack(msgpack.packb(coded | wrong), images=True)


def test_an_image_is_not_decoded_beyond_its_stated_size(monkeypatch: pytest.MonkeyPatch):
    """A small file can hold a huge image."""
    theirs = pytest.importorskip("vla_eval.protocol.image_codec")
    from PIL import Image

    coded = theirs.encode_image(np.zeros((4096, 4200, 3), np.uint8), "png")
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UserError, match="another size"):
        unpack(msgpack.packb(coded | {"shape": [8, 8, 3]}), images=True)
    with pytest.raises(UserError, match="another size"):
        unpack(msgpack.packb(coded), images=True)


@pytest.mark.parametrize("value", [np.array([None]), np.array(["a"]), np.array([1j]), {"a": object()}, np.str_("a")])
def test_what_is_no_number_is_not_sent(value):
    with pytest.raises(ValueError, match=r"sent|place"):
        pack(value if not isinstance(value, np.str_) else np.array(value))


FIELDS = {b"__ndarray__": True, b"data": bytes(8), b"dtype": "<f4", b"shape": [2]}


@pytest.mark.parametrize(
    "change",
    [
        {b"dtype": "|O"}, {b"dtype": "<U2"}, {b"dtype": "f4"}, {b"dtype": "<f4,<f4"}, {b"dtype": 3}, {b"dtype": "<M8"},
        {b"dtype": "(2,)<f4"}, {b"shape": [3]}, {b"shape": [-2]}, {b"shape": [2.0]}, {b"shape": [True, 2]},
        {b"shape": "2"}, {b"shape": None}, {b"shape": [1] * 20}, {b"shape": [2**40, 0]}, {b"data": "text"},
        {b"data": b""}, {b"data": [0] * 8},
    ],
)  # fmt: skip
def test_a_broken_array_is_refused(change: dict):
    assert unpack(msgpack.packb(FIELDS)).shape == (2,)
    with pytest.raises(UserError):
        unpack(msgpack.packb(FIELDS | change))


@pytest.mark.parametrize(
    "frame",
    [
        b"", b"\xc1", b"\x92\x01", b"\x01\x02", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff", b"\x91" * 100_000, b"\x81\xc0\x01", b"\x81\x01\x01", b"\x81\x90\x01",
        b"\xa1\xff", msgpack.packb(msgpack.ExtType(5, b"12345678")), msgpack.packb(list(range(10_000))),
        msgpack.packb({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}),
        msgpack.packb({b"__npgeneric__": True, b"data": [1], b"dtype": "|u1"}),
        msgpack.packb({b"__npgeneric__": True, b"data": 1, b"dtype": "|V8"}),
    ],
)  # fmt: skip
def test_a_broken_frame_is_refused(frame: bytes):
    with pytest.raises(UserError):
        unpack(frame, images=True)


def test_lists_that_only_claim_to_be_long_take_no_memory():
    """msgpack allocates a list when it has read its length, one inside the other: 512 lists of 64 million entries."""
    import tracemalloc

    frame = b"\xdd\x03\xff\xff\xff" * 512 + bytes(1 << 26)
    tracemalloc.start()
    try:
        with pytest.raises(UserError):
            unpack(frame)
        assert tracemalloc.get_traced_memory()[1] < 2 * sys.getsizeof(frame)
    finally:
        tracemalloc.stop()


def test_mutated_frames_are_read_or_refused():
    image = {"__image__": True, "format": "raw", "data": bytes(12), "dtype": "|u1", "shape": [2, 2, 3]}
    frames = [msgpack.packb({"observation/state": FIELDS, "seed": 3}), pack({"a": np.ones(3)}, True)]
    refused = 0
    for frame in mutations([*frames, msgpack.packb({"images": {"top": image}})], 3000, seed=0):
        try:
            unpack(frame, images=True)
        except UserError:
            refused += 1
    assert 500 < refused < 3000
