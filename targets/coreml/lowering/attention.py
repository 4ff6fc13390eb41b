"""Attention and rotary positions, as ONNX's operator specification defines them from opset 23 on.

From iOS18 on Core ML has an operator for attention; it scales by the size of a head and knows neither caps nor causal masks, so queries and
masks come to it prepared. Before, and where an intermediate result is wanted, attention is written out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.targets.coreml.lowering.builder import FLOATS, Lowering


@dataclass
class _Mask:
    """Which scores count.

    Attributes:
        allowed: Bool, a variable or an array: False takes a score out. None: all count.
        bias: Float, added to the scores. None: nothing.
        dead: Bool, one number per query: no score counts, the result is 0. None: that cannot be.
    """

    allowed: Any = None
    bias: Any = None
    dead: Any = None


def _attention(b: Lowering, node: ir.Node) -> Any:
    if b.has(node, 6):
        raise b.refuse("Attention with nonpad_kv_seqlen", "give a mask as attn_mask")
    q, k, v = _heads(b, node, 0, "q_num_heads"), _heads(b, node, 1, "kv_num_heads"), _heads(b, node, 2, "kv_num_heads")
    past = 0
    if b.has(node, 4) != b.has(node, 5):
        raise b.refuse("Attention with one of past_key and past_value", "give both")
    if b.has(node, 4):
        past = b.shape(node, 4)[2]
        k, v = (b.op("concat", values=[b.x(node, index), new], axis=2) for index, new in ((4, k), (5, v)))
    present = (k, v)
    groups = _groups(b, q, k)
    k, v = _repeated(b, k, groups), _repeated(b, v, groups)
    mask = _mask(b, node, past, int(q.shape[2]), int(k.shape[2]))
    y, scores = _attend(b, node, q, k, v, mask)
    if b.rank(node) == 3:
        y = b.op("reshape", x=b.op("transpose", x=y, perm=[0, 2, 1, 3]), shape=list(b.out_shape(node)))
    return (y, *present) if scores is None else (y, *present, scores)


def _heads(b: Lowering, node: ir.Node, index: int, attribute: str) -> Any:
    """An input as [batch, heads, length, size]."""
    x, shape = b.x(node, index), b.shape(node, index)
    heads = node.attributes.get_int(attribute, 0)
    if len(shape) == 4:
        return x
    if len(shape) != 3 or heads < 1 or shape[2] % heads:
        raise b.refuse(f"Attention over shape {list(shape)} with {attribute} = {heads}", f"set {attribute} to a divisor of the last axis")
    split = b.op("reshape", x=x, shape=[shape[0], shape[1], heads, shape[2] // heads])
    return b.op("transpose", x=split, perm=[0, 2, 1, 3])


def _groups(b: Lowering, q: Any, k: Any) -> int:
    """How many heads of the queries read one of the keys."""
    of_queries, of_keys = int(q.shape[1]), int(k.shape[1])
    if of_queries % of_keys:
        raise b.refuse(f"Attention with {of_queries} heads of queries and {of_keys} of keys", "make the first a multiple of the second")
    return of_queries // of_keys


def _repeated(b: Lowering, x: Any, times: int) -> Any:
    """Each head `times` times, one after the other."""
    if times == 1:
        return x
    batch, heads, length, size = (int(dimension) for dimension in x.shape)
    tiled = b.op("tile", x=b.op("expand_dims", x=x, axes=[2]), reps=[1, 1, times, 1, 1])
    return b.op("reshape", x=tiled, shape=[batch, heads * times, length, size])


def _structural(node: ir.Node, past: int, queries: int, keys: int) -> np.ndarray | None:
    """Which keys each query may read by is_causal and the window sizes; None: all."""
    before, after = node.attributes.get_int("left_window_size", -1), node.attributes.get_int("right_window_size", -1)
    causal = node.attributes.get_int("is_causal", 0)
    if not causal and before < 0 and after < 0:
        return None
    distance = np.arange(queries)[:, None] + past - np.arange(keys)  # of a key before its query
    allowed = np.ones((queries, keys), np.bool_)
    if causal:
        allowed &= distance >= 0
    if before >= 0:
        allowed &= distance <= before
    if after >= 0:
        allowed &= -distance <= after
    return allowed


def _mask(b: Lowering, node: ir.Node, past: int, queries: int, keys: int) -> _Mask:
    structural = _structural(node, past, queries, keys)
    array = b.known(node, 3)
    if b.has(node, 3) and array is None:
        return _computed_mask(b, node, structural, keys)
    return _constant_mask(array, structural, keys)


def _constant_mask(array: np.ndarray | None, structural: np.ndarray | None, keys: int) -> _Mask:
    if array is None and structural is None:
        return _Mask()
    if array is not None:
        out = [(0, 0)] * (array.ndim - 1) + [(0, keys - array.shape[-1])]
        array = np.pad(array, out, constant_values=False if array.dtype == np.bool_ else -np.inf)
    if array is None or array.dtype == np.bool_:
        allowed = _both(array, structural)
        dead = ~allowed.any(axis=-1, keepdims=True)
        return _Mask(allowed=allowed, dead=dead if dead.any() else None)
    bias = array.astype(np.float32)
    if structural is not None:
        bias = np.where(structural, bias, -np.inf).astype(np.float32)
    dead = np.isneginf(bias.max(axis=-1, keepdims=True))
    return _Mask(bias=bias, dead=dead if dead.any() else None)


def _both(one: np.ndarray | None, other: np.ndarray | None) -> np.ndarray:
    found = [array for array in (one, other) if array is not None]
    return np.logical_and.reduce(np.broadcast_arrays(*found)) if len(found) > 1 else found[0]


def _computed_mask(b: Lowering, node: ir.Node, structural: np.ndarray | None, keys: int) -> _Mask:
    """A mask that is known when the model runs: whether a query has no key at all is known then too."""
    mask, lacking = b.x(node, 3), keys - b.shape(node, 3)[-1]
    is_bool = b.dtype(node, 3) not in FLOATS
    if lacking:
        numbers = b.op("cast", x=mask, dtype=b.float_name) if is_bool else mask
        padded = b.op("pad", x=numbers, pad=[0, lacking], mode="constant", constant_val=0.0 if is_bool else -np.inf)
        mask = b.op("cast", x=padded, dtype="bool") if is_bool else padded
    if is_bool:
        allowed = mask if structural is None else b.op("logical_and", x=mask, y=structural)
        most = b.op("reduce_max", x=b.op("cast", x=allowed, dtype="int32"), axes=[-1], keep_dims=True)
        return _Mask(allowed=allowed, dead=b.op("equal", x=most, y=0))
    bias = mask if structural is None else b.op("add", x=mask, y=np.where(structural, 0, -np.inf).astype(np.float32))
    most = b.op("reduce_max", x=bias, axes=[-1], keep_dims=True)
    return _Mask(bias=bias, dead=b.op("equal", x=most, y=-np.inf))


def _attend(b: Lowering, node: ir.Node, q: Any, k: Any, v: Any, mask: _Mask) -> tuple[Any, Any]:
    """The result and, where it is read, the intermediate one that qk_matmul_output_mode names."""
    size, cap = int(q.shape[3]), node.attributes.get_float("softcap", 0.0)
    scale = node.attributes.get_float("scale", 0.0) if "scale" in node.attributes else 1 / math.sqrt(size)
    if scale < 0 or cap < 0:
        raise b.refuse(f"Attention with scale {scale:g} and softcap {cap:g}", "use numbers that are not negative")
    wants_scores = len(node.outputs) > 3 and (bool(node.outputs[3].uses()) or node.outputs[3].is_graph_output())
    wide = b.half and node.attributes.get_int("softmax_precision", 0) in (ir.DataType.FLOAT.value, ir.DataType.DOUBLE.value)
    if b.at_least("iOS18") and not cap and not wants_scores and not wide:
        factor = scale * math.sqrt(size)
        scaled = q if math.isclose(factor, 1, rel_tol=1e-7) else b.op("mul", x=q, y=factor)
        attn_mask = mask.allowed if mask.allowed is not None else mask.bias
        return _alive(b, b.op("scaled_dot_product_attention", query=scaled, key=k, value=v, attn_mask=attn_mask), mask), None
    raw = b.op("matmul", x=b.op("mul", x=q, y=scale), y=k, transpose_y=True)
    capped = b.op("mul", x=b.op("tanh", x=b.op("mul", x=raw, y=1 / cap)), y=cap) if cap else raw
    masked = _masked(b, capped, mask)
    weights = _alive(b, _softmax(b, masked, wide), mask)
    y = b.op("matmul", x=weights, y=v)
    mode = node.attributes.get_int("qk_matmul_output_mode", 0)
    return y, (raw, capped, masked, weights)[mode] if wants_scores else None


def _masked(b: Lowering, scores: Any, mask: _Mask) -> Any:
    if mask.allowed is not None:
        return b.op("select", cond=mask.allowed, a=scores, b=-np.inf)
    return scores if mask.bias is None else b.op("add", x=scores, y=mask.bias)


def _softmax(b: Lowering, scores: Any, wide: bool) -> Any:
    """Over the keys; `wide`: in float32, as softmax_precision asks."""
    if not wide:
        return b.op("softmax", x=scores, axis=-1)
    return b.op("cast", x=b.op("softmax", x=b.op("cast", x=scores, dtype="fp32"), axis=-1), dtype="fp16")


def _alive(b: Lowering, y: Any, mask: _Mask) -> Any:
    """Zero for queries that may read no key: their softmax is not a number."""
    return y if mask.dead is None else b.op("select", cond=mask.dead, a=0.0, b=y)


def _rotary_embedding(b: Lowering, node: ir.Node) -> Any:
    shape = b.shape(node)
    heads = node.attributes.get_int("num_heads", 0)
    if len(shape) == 3 and heads < 1:
        raise b.refuse("RotaryEmbedding of rank 3 without num_heads", "set the attribute")
    by_head = list(shape) if len(shape) == 4 else [shape[0], shape[1], heads, shape[2] // heads]
    head_axis = 1 if len(shape) == 4 else 2
    x = b.x(node) if len(shape) == 4 else b.op("reshape", x=b.x(node), shape=by_head)
    rotated = node.attributes.get_int("rotary_embedding_dim", 0) or by_head[-1]
    cos, sin = (_positions(b, node, index, head_axis) for index in (1, 2))
    interleaved = bool(node.attributes.get_int("interleaved", 0))
    one, two = _halves(b, x, rotated, interleaved)
    real = b.op("sub", x=b.op("mul", x=one, y=cos), y=b.op("mul", x=two, y=sin))
    imaginary = b.op("add", x=b.op("mul", x=one, y=sin), y=b.op("mul", x=two, y=cos))
    if interleaved:
        y = b.op("reshape", x=b.op("stack", values=[real, imaginary], axis=4), shape=[*by_head[:-1], rotated])
    else:
        y = b.op("concat", values=[real, imaginary], axis=3)
    if rotated < by_head[-1]:
        y = b.op("concat", values=[y, _last_axis(b, x, rotated, by_head[-1], 1)], axis=3)
    return y if len(shape) == 4 else b.op("reshape", x=y, shape=list(shape))


def _positions(b: Lowering, node: ir.Node, index: int, head_axis: int) -> Any:
    """The cosines or sines of each place, with an axis for the heads."""
    cache = b.x(node, index)
    if b.has(node, 3):
        cache = b.op("gather", x=cache, indices=b.x(node, 3), axis=0)
    return b.op("expand_dims", x=cache, axes=[head_axis])


def _halves(b: Lowering, x: Any, rotated: int, interleaved: bool) -> tuple[Any, Any]:
    """The two numbers of each rotated pair."""
    if interleaved:
        return _last_axis(b, x, 0, rotated, 2), _last_axis(b, x, 1, rotated, 2)
    return _last_axis(b, x, 0, rotated // 2, 1), _last_axis(b, x, rotated // 2, rotated, 1)


def _last_axis(b: Lowering, x: Any, begin: int, end: int, step: int) -> Any:
    *outer, _ = (int(size) for size in x.shape)
    zeros, ones = [0] * len(outer), [1] * len(outer)
    return b.op("slice_by_index", x=x, begin=[*zeros, begin], end=[*outer, end], stride=[*ones, step])


TABLE = {"Attention": _attention, "RotaryEmbedding": _rotary_embedding}
