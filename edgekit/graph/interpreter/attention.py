"""Attention in its forms: softmax attention with masks and caches, linear attention, rotary positions, causal convolution."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgekit.graph.interpreter.normalization import softmax_in_steps
from edgekit.graph.interpreter.registry import Call, operator
from edgekit.graph.interpreter.values import NATIVE, DataType, NotSupportedError


def _split_heads(x: Tensor, heads: int | None) -> Tensor:
    """`[B, N, H D]` to `[B, H, N, D]`; four axes stay as they are."""
    if x.dim() == 4:
        return x
    if not heads:
        raise ValueError("inputs of three axes need q_num_heads and kv_num_heads")
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Key or value heads `[B, Hkv, N, D]`, each repeated for its group of query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


@operator("Attention", since=23)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    lengths: Tensor | None = None,
    /,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    call: Call,
) -> Tensor | tuple[Any, ...]:
    """Softmax attention (Vaswani et al. 2017), with grouped queries, a key and value cache, and masks.

    `[B, H, N, D]` or `[B, N, H D]`; also gives the keys and values with the past before them, and the scores at the stage that
    `qk_matmul_output_mode` asks for.
    """
    packed = query.dim() == 3
    query, key, value = _split_heads(query, q_num_heads), _split_heads(key, kv_num_heads), _split_heads(value, kv_num_heads)
    past = 0
    if past_key is not None and past_value is not None:
        past = past_key.shape[2]
        key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    present_key, present_value = key, value
    heads = query.shape[1]
    key, value = _repeat_heads(key, heads), _repeat_heads(value, heads)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores: Tensor | None = None
    bounded = left_window_size >= 0 or right_window_size >= 0
    half = query.dtype in (torch.float16, torch.bfloat16)
    if mask is None and lengths is None and not (past or softcap or bounded or call.wants(3) or half or softmax_precision):
        result = functional.scaled_dot_product_attention(query, key, value, is_causal=bool(is_causal), scale=scale)
    else:
        offset = torch.full((1,), past) if lengths is None else lengths - query.shape[2]
        allowed = _allowed(query.shape[2], key.shape[2], offset, lengths, is_causal, left_window_size, right_window_size)
        bias = _bias(mask, allowed, query.dtype, key.shape[2])
        precision = None if softmax_precision is None else call.precision.held(DataType(softmax_precision))
        result, scores = _explicit(query, key, value, bias, scale, softcap, precision, qk_matmul_output_mode)
    if packed:
        result = result.transpose(1, 2).flatten(2)
    return (result, present_key, present_value, scores) if len(call.outputs) > 1 else result


def _allowed(queries: int, keys: int, offset: Tensor, lengths: Tensor | None, causal: int, left: int, right: int) -> Tensor | None:
    """Which keys each query may see, `[B or 1, 1, N, S]`; None for all."""
    if not causal and left < 0 and right < 0 and lengths is None:
        return None
    position = (offset[:, None] + torch.arange(queries))[:, None, :, None]
    index = torch.arange(keys)
    allowed = torch.ones(position.shape[0], 1, queries, keys, dtype=torch.bool)
    if causal:
        allowed &= index <= position
    if left >= 0:
        allowed &= index >= position - left
    if right >= 0:
        allowed &= index <= position + right
    if lengths is not None:
        allowed = allowed & (index < lengths[:, None, None, None])
    return allowed


def _bias(mask: Tensor | None, allowed: Tensor | None, dtype: torch.dtype, keys: int) -> Tensor | None:
    """The masks as one term of the scores: minus infinity where a key is not seen."""
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else mask
        if bias.shape[-1] < keys:
            bias = functional.pad(bias, [0, keys - bias.shape[-1]], value=-torch.inf)
    if allowed is not None:
        hidden = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, -torch.inf)
        bias = hidden if bias is None else bias + hidden
    return bias


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    precision: torch.dtype | None,
    mode: int,
) -> tuple[Tensor, Tensor]:
    """Attention written out; gives the result and the scores at stage `mode`."""
    # On both sides, so that 16-bit products do not overflow; the factor has the type of the query, as in the function body.
    root = torch.tensor(math.sqrt(abs(scale)), dtype=query.dtype)
    stages = [(query * (root if scale > 0 else -root)) @ (key * root).transpose(-1, -2)]
    stages.append(softcap * torch.tanh(stages[0] / softcap) if softcap else stages[0])
    masked: Tensor | None = None
    if bias is not None:
        hidden = (bias == -torch.inf).expand(stages[1].shape)
        # What is hidden is hidden whatever the score, NaN included; a row without keys gives zeros and passes no gradient.
        stages.append(torch.where(hidden, -torch.inf, stages[1] + bias))
        masked = hidden.all(-1, keepdim=True)
    else:
        stages.append(stages[1])
    logits = stages[2] if masked is None else stages[2].masked_fill(masked, 0.0)
    probabilities = softmax_in_steps(logits if precision is None else logits.to(precision), -1).to(value.dtype)
    if masked is not None:
        probabilities = probabilities.masked_fill(masked, 0.0)
    stages.append(probabilities)
    return probabilities @ value, stages[mode].to(query.dtype)


@operator("FlexAttention", domain="ai.onnx.preview")
def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    /,
    *,
    scale: float | None = None,
    softmax_precision: int | None = None,
    score_mod: Callable[[Tensor], list[Tensor]] | None = None,
    prob_mod: Callable[[Tensor], list[Tensor]] | None = None,
) -> Tensor:
    """Attention whose scores and probabilities pass through graphs, `[B, H, N, D]`."""
    key, value = _repeat_heads(key, query.shape[1]), _repeat_heads(value, query.shape[1])
    wide = torch.promote_types(query.dtype, torch.float32) if softmax_precision is None else NATIVE[DataType(softmax_precision)]
    wide = torch.promote_types(wide, query.dtype)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query.to(wide) @ key.to(wide).transpose(-1, -2) * scale
    if score_mod is not None:
        (scores,) = score_mod(scores)
    probabilities = torch.softmax(scores, -1)
    if prob_mod is not None:
        (probabilities,) = prob_mod(probabilities)
    return (probabilities @ value.to(wide)).to(query.dtype)


@operator("LinearAttention", since=27)
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_state: Tensor | None = None,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    /,
    *,
    kv_num_heads: int,
    q_num_heads: int,
    chunk_size: int = 64,
    scale: float = 0.0,
    update_rule: str = "gated_delta",
) -> tuple[Tensor, Tensor]:
    """The recurrence of linear attention, token by token, on `[B, T, H D]`; gives the output and the last state `[B, Hkv, Dk, Dv]`."""
    if update_rule not in ("linear", "gated", "delta", "gated_delta"):
        raise NotSupportedError(f"update_rule '{update_rule}'")
    dtype = query.dtype
    wide = torch.promote_types(dtype, torch.float32)
    queries = _split_heads(query.to(wide), q_num_heads)
    keys, values = _split_heads(key.to(wide), kv_num_heads), _split_heads(value.to(wide), kv_num_heads)
    batch, _, steps, width = keys.shape
    scale = scale or 1 / math.sqrt(queries.shape[-1])
    state_type = dtype if past_state is None else past_state.dtype
    state = torch.zeros(batch, kv_num_heads, width, values.shape[-1], dtype=wide) if past_state is None else past_state.to(wide)
    gates = torch.exp(_split_heads(decay.to(wide), kv_num_heads)) if decay is not None and "gated" in update_rule else None
    rates = None
    if beta is not None and "delta" in update_rule:
        rates = beta.to(wide).transpose(1, 2)[..., None]  # [B, Hkv or 1, T, 1]
    outputs = []
    for step in range(steps):
        k, v = keys[:, :, step, :, None], values[:, :, step, None, :]
        if gates is not None:
            state = gates[:, :, step, :, None] * state
        if "delta" in update_rule:
            assert rates is not None
            v = rates[:, :, step, :, None] * (v - k.transpose(-1, -2) @ state)
        state = state + k * v
        q = queries[:, :, step, None, :]
        outputs.append(scale * (q @ _repeat_heads(state, q_num_heads)).squeeze(-2))
    return torch.stack(outputs, 1).flatten(2).to(dtype), state.to(state_type)


@operator("RotaryEmbedding", since=23)
def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    /,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """Rotates pairs of channels by their position (Su et al. 2021), `[B, H, N, D]` or `[B, N, H D]`."""
    tokens = x.transpose(1, 2) if x.dim() == 4 else x.reshape(x.shape[0], x.shape[1], num_heads, -1)  # [B, N, H, D]
    width = rotary_embedding_dim or tokens.shape[-1]
    turned, kept = tokens[..., :width], tokens[..., width:]
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    real, imaginary = cos * first - sin * second, sin * first + cos * second
    turned = torch.stack([real, imaginary], -1).flatten(-2) if interleaved else torch.cat([real, imaginary], -1)
    result = torch.cat([turned, kept], -1)
    return result.transpose(1, 2) if x.dim() == 4 else result.reshape(x.shape)


@operator("CausalConvWithState", since=27)
def causal_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, past_state: Tensor | None = None, /, *, activation: str = "none"
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution, `[B, C, L]`; gives the output and the last k - 1 inputs."""
    reach = weight.shape[-1] - 1
    past = torch.zeros(*x.shape[:2], reach, dtype=x.dtype) if past_state is None else past_state
    extended = torch.cat([past, x], -1)
    result = functional.conv1d(extended, weight, bias, groups=x.shape[1])
    if activation not in ("none", "silu", "swish"):
        raise NotSupportedError(f"activation '{activation}'")
    return (result if activation == "none" else functional.silu(result)), extended[..., extended.shape[-1] - reach :]
