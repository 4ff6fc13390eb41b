"""Matrix products of the evaluator against numpy in float64, coremltools' value inference and the documentation's shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgekit.targets.coreml.reference.operators.linear import TABLE
from tests.targets.coreml.reference.mil_support import call, check_signatures, inferred, run

Array = np.ndarray[Any, Any]


def _random(*shape: int) -> Array:
    return np.random.default_rng(sum(shape) + len(shape)).normal(size=shape).astype(np.float32)


def _integers(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).integers(-9, 9, shape).astype(np.int32)


def test_signatures() -> None:
    check_signatures(TABLE)


@pytest.mark.parametrize("make", [_random, _integers])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_linear(shape: tuple[int, ...], bias: bool, make: Any) -> None:
    x, weight = make(*shape), make(5, 4)
    given = {"bias": make(5)} if bias else {}
    result = call(TABLE["linear"], x=x, weight=weight, **given)
    assert result.dtype == x.dtype
    np.testing.assert_allclose(result, x.astype(np.float64) @ weight.T + given.get("bias", 0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result, inferred("linear", x=x, weight=weight, **given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [_random, _integers])
@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((10, 4, 3), (5, 10, 3, 2)), ((4, 3), (3, 2)), ((4,), (10, 4, 3)), ((10, 3, 4), (4,)), ((4,), (4,)),  # those of the documentation
        ((1, 2, 3), (5, 3, 1)), ((2, 1, 4, 3), (3, 3, 2)),
    ],
)  # fmt: skip
def test_matmul(left: tuple[int, ...], right: tuple[int, ...], make: Any) -> None:
    x, y = make(*left), make(*right)
    result = call(TABLE["matmul"], x=x, y=y)
    expected = np.matmul(x.astype(np.float64), y)
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    if len(right) > 1:  # coremltools cannot infer a product with a vector on the right
        np.testing.assert_allclose(result, inferred("matmul", x=x, y=y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True), (True, True)])
def test_matmul_transposed(first: bool, second: bool) -> None:
    x, y = _random(2, *((3, 4) if first else (4, 3))), _random(5, 1, *((6, 3) if second else (3, 6)))
    result = call(TABLE["matmul"], x=x, y=y, transpose_x=first, transpose_y=second)
    expected = np.matmul(x.swapaxes(-1, -2) if first else x, y.swapaxes(-1, -2) if second else y)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result, inferred("matmul", x=x, y=y, transpose_x=first, transpose_y=second), rtol=1e-5, atol=1e-5)


def test_matmul_transposes_no_vector() -> None:
    x, y = _random(4), _random(4, 3)
    np.testing.assert_allclose(call(TABLE["matmul"], x=x, y=y, transpose_x=True), x @ y, rtol=1e-5)
    np.testing.assert_allclose(call(TABLE["matmul"], x=y, y=x, transpose_x=True, transpose_y=True), y.T @ x, rtol=1e-5)


@pytest.mark.parametrize("operator", ["linear", "matmul"])
def test_types_may_differ(operator: str) -> None:
    x, y = _integers(2, 3), _random(3, 3)
    result = call(TABLE[operator], **({"x": x, "weight": y.T.copy()} if operator == "linear" else {"x": x, "y": y}))
    np.testing.assert_allclose(result, x @ y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [
        ("nchw,nwhu->nchu", (2, 3, 4, 5), (2, 5, 4, 6)),
        ("nchw,nwhu->nchu", (1, 3, 4, 5), (2, 5, 1, 6)),
        ("abcd,adce->abce", (2, 3, 1, 5), (1, 5, 4, 6)),
        ("chw,whr->chr", (3, 4, 5), (5, 4, 6)),
        ("chw,whr->chr", (3, 1, 5), (5, 4, 6)),
    ],
)
def test_einsum_of_the_documentation(equation: str, left: tuple[int, ...], right: tuple[int, ...]) -> None:
    values = [_random(*left), _random(*right)]
    result = call(TABLE["einsum"], values=values, equation=equation)
    # Dimensions but C and the last one of each, which are not shared, broadcast.
    batch, rows = left[:-3], left[-3]
    size = np.broadcast_shapes(batch, right[:-3])
    high = max(left[-2], right[-2])
    x = np.broadcast_to(values[0], (*size, rows, high, left[-1])).astype(np.float64)
    y = np.broadcast_to(values[1], (*size, right[-3], high, right[-1]))
    expected = np.matmul(x.swapaxes(-3, -2), y.swapaxes(-3, -2)).swapaxes(-3, -2)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result, inferred("einsum", values=values, equation=equation), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("ij->ji", [(2, 3)]), ("ii->i", [(3, 3)]), ("ij->", [(2, 3)]), ("bhqd,bhkd->bhqk", [(2, 3, 4, 5), (2, 3, 6, 5)]),
        ("i,j->ij", [(3,), (4,)]), ("ij,jk,kl->il", [(2, 3), (3, 4), (4, 2)]), ("...ij,...jk->...ik", [(2, 1, 3, 4), (5, 4, 2)]),
        ("aB,Bc", [(2, 3), (3, 4)]), ("bij,bjk->ik", [(2, 3, 4), (2, 4, 5)]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("make", [_random, _integers])
def test_general_einsum(equation: str, shapes: list[tuple[int, ...]], make: Any) -> None:
    values = [make(*shape) for shape in shapes]
    expected = np.einsum(equation, *[value.astype(np.float64) for value in values])
    np.testing.assert_allclose(call(TABLE["einsum"], values=values, equation=equation), expected, rtol=1e-5, atol=1e-5)


def _attention(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    scores = query.astype(np.float64) @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True) @ value)


@pytest.mark.parametrize("mask", ["none", "bool", "float", "row"])
@pytest.mark.parametrize("batch", [(2,), (2, 3), (1, 2, 2)])
def test_scaled_dot_product_attention(batch: tuple[int, ...], mask: str) -> None:
    query, key, value = _random(*batch, 4, 8), _random(*batch, 5, 8) + 1, _random(*batch, 5, 6)
    masks: dict[str, Any] = {"bool": np.tri(4, 5, dtype=bool), "float": _random(*batch[:-1], 1, 4, 5), "row": _random(1, 5)}
    given = {"attn_mask": masks[mask]} if mask in masks else {}
    result = call(TABLE["scaled_dot_product_attention"], query=query, key=key, value=value, **given)
    np.testing.assert_allclose(result, _attention(query, key, value, given.get("attn_mask")), rtol=1e-4, atol=1e-5)
    if "attn_mask" not in given or given["attn_mask"].ndim <= query.ndim:
        same = inferred("scaled_dot_product_attention", "iOS18", query=query, key=key, value=value, **given)
        np.testing.assert_allclose(result, same, rtol=1e-4, atol=1e-5)


def test_a_query_with_nothing_to_attend_to_is_not_a_number() -> None:
    query = _random(1, 2, 4)
    mask = np.array([[True, False], [False, False]])
    result = call(TABLE["scaled_dot_product_attention"], query=query, key=query, value=query, attn_mask=mask)
    np.testing.assert_allclose(result[0, 0], query[0, 0], rtol=1e-6)
    assert np.isnan(result[0, 1]).all()


def test_in_a_program() -> None:
    from coremltools.converters.mil.mil import Builder as mb

    x, weight, bias = _random(1, 4, 6), _random(6, 6), _random(6)

    def build(x: Any) -> Any:
        projected = mb.linear(x=x, weight=weight, bias=bias)
        attended = mb.scaled_dot_product_attention(query=projected, key=x, value=x)
        return mb.matmul(x=attended, y=x, transpose_y=True)

    (result,) = run(build, {"x": x}, "iOS18", TABLE)
    tensor = torch.from_numpy(x)
    projected = torch.nn.functional.linear(tensor, torch.from_numpy(weight), torch.from_numpy(bias))
    np.testing.assert_allclose(result, _attention(projected.numpy(), x, x, None) @ x.swapaxes(1, 2), rtol=1e-4, atol=1e-4)
