"""Attention against ONNX's reference on both sides of iOS18, where Core ML got an operator for it; and rotary positions."""

from __future__ import annotations

import numpy as np
import pytest

from tests.targets.coreml.lowered import check
from tests.targets.coreml.node_text import floats, of_shape, text

Q, K, V = (2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 6)
BOOLS = np.random.default_rng(0).random((2, 1, 3, 5)) > 0.5
BOOLS[0, 0, 1] = False  # a query that may read no key
BIAS = floats(3, 5, seed=9)
BIAS[2] = -np.inf
CASES = {
    "plain": ("", {}),
    "scale and cap": ("scale = 0.3, softcap = 2.0", {}),
    "causal": ("is_causal = 1", {}),
    "grouped": ("", {"k": (2, 2, 5, 8), "v": (2, 2, 5, 6)}),
    "rank 3": ("q_num_heads = 4, kv_num_heads = 2, is_causal = 1", {"q": (2, 3, 32), "k": (2, 5, 16), "v": (2, 5, 12)}),
    "bool mask": ("is_causal = 1", {"m": BOOLS}),
    "float mask": ("scale = 0.3", {"m": BIAS}),
    "float mask and causal": ("is_causal = 1", {"m": BIAS}),
    "mask of heads": ("", {"m": floats(4, 3, 5, seed=8)}),
    "short bool mask": ("", {"m": BOOLS[..., :4]}),
    "short float mask": ("", {"m": BIAS[:2].repeat(2, 0)[:3, :4]}),
}


def arrays_of(shapes: dict[str, object]) -> dict[str, np.ndarray]:
    """Queries, keys and values, and what else a case names."""
    found = {"q": Q, "k": K, "v": V} | shapes
    return {name: floats(*value, seed=seed) if isinstance(value, tuple) else value for seed, (name, value) in enumerate(found.items())}


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("version", ["", "iOS18"])
@pytest.mark.parametrize("name", CASES)
def test_attention(name: str, version: str, constant: bool) -> None:
    attributes, more = CASES[name]
    arrays = arrays_of(more)
    if constant and "m" not in arrays:
        pytest.skip("it has no mask")
    inputs = {key: array for key, array in arrays.items() if not (constant and key == "m")}
    declared = ", ".join(
        f"{of_shape(array.shape).replace('float', array.dtype.name.replace('32', ''))} {key}" for key, array in inputs.items()
    )
    model = text(f"y = Attention<{attributes}>({', '.join(arrays)})", declared)
    converted = check(model, inputs, version=version, **({"m": arrays["m"]} if constant else {}))
    assert converted.version == (version or "iOS15")


@pytest.mark.parametrize("version", ["", "iOS18"])
def test_past_and_present(version: str) -> None:
    arrays = arrays_of({"pk": (2, 4, 2, 8), "pv": (2, 4, 2, 6)})
    declared = ", ".join(f"{of_shape(array.shape)} {key}" for key, array in arrays.items())
    model = text("y, nk, nv = Attention<is_causal = 1>(q, k, v, , pk, pv)", declared, "float[] y, float[] nk, float[] nv")
    check(model, arrays, version=version)


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_intermediate_results(mode: int) -> None:
    arrays = arrays_of({"m": floats(3, 5, seed=8)})
    declared = ", ".join(f"{of_shape(array.shape)} {key}" for key, array in arrays.items())
    cap = ", softcap = 2.0" if mode else ""  # mode 0 is before the cap, unlike ONNX's reference
    call = f"Attention<qk_matmul_output_mode = {mode}{cap}>(q, k, v, m)"
    check(
        text(f"y, nk, nv, s = {call}", declared, "float[] y, float[2,4,5,8] nk, float[2,4,5,6] nv, float[2,4,3,5] s"),
        arrays,
        version="iOS18",
    )


@pytest.mark.parametrize("version", ["", "iOS18"])
@pytest.mark.parametrize("attributes", ["is_causal = 1", "softmax_precision = 1"])
def test_attention_in_half(attributes: str, version: str) -> None:
    declared = ", ".join(f"{of_shape(array.shape)} {key}" for key, array in arrays_of({}).items())
    check(text(f"y = Attention<{attributes}>(q, k, v)", declared), arrays_of({}), half=True, version=version)


def test_lengths_of_keys() -> None:
    """Attention with `nonpad_kv_seqlen` is written out by its definition."""
    declared = "float[2,1,2,4] q, float[2,1,3,4] k, float[2,1,3,4] v, int64[2] n"
    arrays = {name: np.random.default_rng(0).normal(size=(2, 1, 2 if name == "q" else 3, 4)).astype(np.float32) for name in "qkv"}
    check(text("y = Attention(q, k, v, , , , n)", declared, opset=24), arrays | {"n": np.array([2, 3])})


ROTATIONS = {
    "rank 4": ("", (2, 3, 4, 8), 4),
    "rank 3": ("num_heads = 3", (2, 4, 24), 4),
    "interleaved": ("interleaved = 1", (2, 3, 4, 8), 4),
    "partial": ("rotary_embedding_dim = 4", (2, 3, 4, 8), 2),
    "interleaved and partial": ("num_heads = 3, interleaved = 1, rotary_embedding_dim = 4", (2, 4, 24), 2),
}


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("name", ROTATIONS)
def test_rotary_embedding(name: str, positions: bool) -> None:
    attributes, shape, half = ROTATIONS[name]
    cache = (10, half) if positions else (2, 4, half)
    inputs = {"x": floats(*shape)} | ({"p": np.random.default_rng(0).integers(0, 10, (2, 4))} if positions else {})
    declared = f"{of_shape(shape)} x" + (", int64[2,4] p" if positions else "")
    model = text(f"y = RotaryEmbedding<{attributes}>(x, c, s{', p' if positions else ''})", declared)
    check(model, inputs, c=floats(*cache, seed=1), s=floats(*cache, seed=2))
