"""Messages on the wire: msgpack with numpy arrays as `openpi-client` packs them. Nothing is ever unpickled.

An array is a map `{b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [...]}`, a numpy scalar
`{b"__npgeneric__": True, b"data": number, b"dtype": "<f4"}`. Only booleans, integers and floats travel.
"""

from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np

from wallwm_jax.console import UserError

_KINDS = "biuf"  # of numpy dtypes


def packb(message: Any) -> bytes:
    """Packs plain values and arrays. Raises TypeError or ValueError for what the wire does not carry."""
    return msgpack.packb(message, default=pack_numpy)


def unpackb(data: bytes) -> Any:
    """Unpacks what `packb` or `openpi-client` packed; arrays are read-only views of `data`.

    Raises:
      UserError: no msgpack, an array whose size is not that of its shape, or one of Python objects.
    """
    try:
        return msgpack.unpackb(data, object_hook=_unpack_numpy)
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, RecursionError, OverflowError, msgpack.UnpackException) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"the message is not msgpack as openpi-client packs it ({reason})") from error


def pack_numpy(value: Any) -> Any:
    """What msgpack is to pack in place of an array or a numpy scalar; its `default`."""
    if not isinstance(value, np.ndarray | np.generic) or value.dtype.kind not in _KINDS:
        raise TypeError(f"cannot send {getattr(value, 'dtype', type(value).__name__)}")
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}


def _unpack_numpy(value: dict[Any, Any]) -> Any:
    if b"__npgeneric__" in value:
        return _dtype(value[b"dtype"]).type(value[b"data"])
    if b"__ndarray__" not in value:
        return value
    data, shape, dtype = value[b"data"], tuple(value[b"shape"]), _dtype(value[b"dtype"])
    if not all(isinstance(side, int) and side >= 0 for side in shape):
        raise UserError(f"an array has the shape {list(shape)}")
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise UserError(f"an array of shape {list(shape)} and dtype {dtype} has {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(shape)


def _dtype(name: Any) -> np.dtype:
    dtype = np.dtype(name) if isinstance(name, str) else np.dtype(object)
    if dtype.kind not in _KINDS:
        raise UserError(f"arrays hold booleans, integers or floats, not {name!r}; Python objects are never unpickled")
    return dtype
