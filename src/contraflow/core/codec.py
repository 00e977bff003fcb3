"""msgpack frames with NumPy arrays, in the dialects of openpi and vla-eval.

openpi writes an array as {b"__ndarray__": True, b"data": bytes, b"dtype": str, b"shape": list} and a NumPy scalar as
{b"__npgeneric__": True, b"data": number, b"dtype": str}. vla-eval writes arrays with keys of text, and may send images
as {"__image__": True, "format": "png" | "jpeg" | "raw", "data": bytes, "shape": [h, w, c]}.

Frames may come from strangers. Only plain numbers become arrays, sizes are checked before anything is allocated, and
whatever is wrong with a frame raises UserError.
"""

import io
import math
from functools import partial
from typing import Any

import msgpack
import numpy as np

from contraflow.core.types import UserError

KINDS = {"b1", "f2", "f4", "f8", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8))}
MOST_DIMS, MOST_LENGTH = 8, 1 << 31
MOST_PIXELS = 1 << 24
# msgpack allocates a list as soon as it has read its length, and lists may be nested a thousand times.
LIMITS = {"max_array_len": 4096, "max_map_len": 1024, "max_str_len": 1 << 20, "max_ext_len": 0}


def pack(value: Any, text_keys: bool = False) -> bytes:
    """Returns the frame of `value`; `text_keys` as in vla-eval. Raises ValueError for other types."""
    return msgpack.Packer(default=partial(_packed, text_keys)).pack(value)


def _packed(text_keys: bool, value: Any) -> Any:
    if not isinstance(value, np.ndarray | np.generic):
        raise ValueError(f"a frame has no place for a {type(value).__name__}")
    if value.dtype.kind not in "biuf":
        raise ValueError(f"arrays of {value.dtype} cannot be sent, only numbers")
    if text_keys and isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    fields = {"__ndarray__": True, "data": value.tobytes(), "dtype": value.dtype.str, "shape": list(value.shape)}
    return fields if text_keys else {key.encode(): field for key, field in fields.items()}


def unpack(frame: bytes, images: bool = False) -> Any:
    """Returns what a frame of either dialect holds; its arrays are read-only. Encoded images are read on request.

    Raises UserError for anything that is not such a frame.
    """
    try:
        return msgpack.unpackb(frame, object_hook=partial(_unpacked, images), **LIMITS)
    except UserError:
        raise
    except Exception:  # broken frames raise errors of many kinds
        raise UserError("this frame is not valid msgpack, or longer than any observation") from None


def _unpacked(images: bool, fields: dict[Any, Any]) -> Any:
    if b"__ndarray__" in fields:
        return _array(fields.get(b"data"), fields.get(b"dtype"), fields.get(b"shape"))
    if "__ndarray__" in fields:
        return _array(fields.get("data"), fields.get("dtype"), fields.get("shape"))
    if b"__npgeneric__" in fields:
        return _scalar(fields.get(b"data"), fields.get(b"dtype"))
    if images and "__image__" in fields:
        return _image(fields)
    return fields


def _dtype(name: Any) -> np.dtype:
    if not (isinstance(name, str) and name[:1] in "<>|=" and name[1:] in KINDS):
        raise UserError("an array is of a type that is not accepted: send numbers, such as float32 or uint8")
    return np.dtype(name)


def _array(data: Any, dtype: Any, shape: Any) -> np.ndarray:
    kind = _dtype(dtype)
    if not (isinstance(shape, list) and len(shape) <= MOST_DIMS):
        raise UserError("an array has no valid shape")
    if not all(type(n) is int and 0 <= n < MOST_LENGTH for n in shape):
        raise UserError("an array has no valid shape")
    if not (isinstance(data, bytes) and math.prod(shape) * kind.itemsize == len(data)):
        raise UserError("the data of an array do not fit its type and shape")
    array = np.ndarray(shape, kind, data)
    if kind.kind == "b":
        array = np.asarray(np.ndarray(shape, np.uint8, data) != 0)  # other bytes are no truth values
    return array if kind.isnative else array.astype(kind.newbyteorder("="))


def _scalar(data: Any, dtype: Any) -> Any:
    if isinstance(data, str):  # a string of NumPy
        return data
    if not isinstance(data, int | float):
        raise UserError("a NumPy scalar holds no number")
    try:
        return _dtype(dtype).type(data)
    except (OverflowError, ValueError):
        raise UserError("a NumPy scalar does not fit its type") from None


def _image(fields: dict[Any, Any]) -> np.ndarray:
    form, data, shape = fields.get("format"), fields.get("data"), fields.get("shape")
    if form == "raw":
        return _array(data, fields.get("dtype"), shape)
    if not (form in ("png", "jpeg") and isinstance(data, bytes) and isinstance(shape, list) and len(shape) == 3):
        raise UserError("an image must be raw, png or jpeg, with its shape")
    try:
        from PIL import Image
    except ImportError:
        raise UserError('this server cannot read images: pip install "contraflow[serve]"') from None
    try:
        with Image.open(io.BytesIO(data), formats=[form.upper()]) as image:
            small = [image.height, image.width] == shape[:2] and image.height * image.width <= MOST_PIXELS
            array = np.asarray(image) if small else None  # which decodes it
    except Exception as error:  # of many kinds, too
        raise UserError(f"an image cannot be read as {form}") from error
    if array is None or array.shape != tuple(shape):
        raise UserError("an image has another size than its shape")
    return array
