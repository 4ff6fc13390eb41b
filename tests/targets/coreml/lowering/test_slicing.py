"""Slices and padding, lowered and run, against ONNX's reference and numpy."""

from __future__ import annotations

import numpy as np
import pytest

from tests.targets.coreml.lowered import check
from tests.targets.coreml.lowering.moves_support import floats, graph, refused, result

X = floats(3, 6, 7)
LAST = 2**63 - 1

SLICES = [
    ([1], [5], [1], None),
    ([0, 1], [3, -1], [0, 2], None),
    ([-3], [LAST], [-1], None),
    ([0], [LAST], [2], [3]),
    ([-1], [-LAST], [1], [-1]),
    ([5], [0], [1], [-2]),
    ([LAST], [-LAST], [2], [-3]),
    ([-100], [100], [1], [1]),
    ([3], [2], [1], [-1]),
    ([0, 0, 0], [2, 4, 6], None, None),
    ([6, 1], [-LAST, 3], [2, 0], [-1, 1]),
    ([3, 1], [-LAST, 3], [2, 0], [-2, 1]),
]


@pytest.mark.parametrize("kind", ["float", "bool", "int32"])
@pytest.mark.parametrize(("starts", "ends", "axes", "steps"), SLICES)
def test_slices(starts, ends, axes, steps, kind):
    bounds = [slice(None)] * 3
    for at, (start, end) in enumerate(zip(starts, ends, strict=True)):
        bounds[axes[at] if axes else at] = slice(start, end, steps[at] if steps else 1)
    dims = ",".join(map(str, X[tuple(bounds)].shape))
    constants = {"s": starts, "e": ends, "a": axes, "t": steps}
    given = {name: np.array(value) for name, value in constants.items() if value is not None}
    x = (X * 3).astype({"float": np.float32, "bool": bool, "int32": np.int32}[kind])
    model = graph(f"{kind}[3,6,7] x", f"{kind}[{dims}] y", f"y = Slice(x, {', '.join(given)})")
    np.testing.assert_array_equal(result(model, {"x": x}, **given), x[tuple(bounds)])


@pytest.mark.parametrize(("starts", "ends", "axes", "steps"), [case for case in SLICES if case[2] and len(case[2]) == 1])
def test_slices_with_computed_bounds(starts, ends, axes, steps):
    (start, end), axis, step = (int(np.clip(value[0], -(2**31), 2**31 - 1)) for value in (starts, ends)), axes[0], steps[0] if steps else 1
    bounds = [slice(None)] * 3
    bounds[axis] = slice(start, end, step)
    dims = ",".join(map(str, X[tuple(bounds)].shape))
    text = graph("float[3,6,7] x, int64[1] s, int64[1] e", f"float[{dims}] y", "y = Slice(x, s, e, a, t)")
    inputs = {"x": X, "s": np.array([start]), "e": np.array([end])}
    check(text, inputs, a=np.array(axes), t=np.array([step]))


PADS = [
    ([0, 0, 1, 0, 0, 2], None),
    ([0, 2, 1, 0, 3, 2], None),
    ([1, 0, 0, 2, 0, 0], None),
    ([2, 1], [1]),
    ([2, 1, 0, 3], [-1, 0]),
]


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
@pytest.mark.parametrize("kind", ["float", "int32", "bool"])
@pytest.mark.parametrize(("pads", "axes"), PADS)
def test_pads(pads, axes, mode, kind):
    chosen = axes or [0, 1, 2]
    shape = list(X.shape)
    for at, axis in enumerate(chosen):
        shape[axis] += pads[at] + pads[at + len(chosen)]
    dims = ",".join(map(str, shape))
    x = (X * 3).astype({"float": np.float32, "int32": np.int32, "bool": bool}[kind])
    value = np.array(1).astype(x.dtype)
    names = "x, p, v, a" if axes else "x, p, v"
    constants = {"p": np.array(pads), "v": value} | ({"a": np.array(axes)} if axes else {})
    check(graph(f"{kind}[3,6,7] x", f"{kind}[{dims}] y", f'y = Pad<mode="{mode}">({names})'), {"x": x}, **constants)


@pytest.mark.parametrize("mode", ["reflect", "edge", "wrap"])
@pytest.mark.parametrize("amount", [2, 5, 9])
def test_pads_longer_than_the_axis_go_on_as_numpy_does(mode, amount):
    x = floats(2, 2, 3)
    text = graph("float[2,2,3] x", f"float[2,2,{3 + 2 * amount}] y", f'y = Pad<mode="{mode}">(x, p)')
    np.testing.assert_array_equal(
        result(text, {"x": x}, p=np.array([0, 0, amount] * 2)), np.pad(x, [(0, 0), (0, 0), (amount, amount)], mode=mode)
    )


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
def test_negative_pads_remove_elements_first(mode):
    text = graph("float[3,6,7] x", "float[3,5,8] y", f'y = Pad<mode="{mode}">(x, p)')
    expected = np.pad(X[:, 2:, :-1], [(0, 0), (0, 1), (2, 0)], mode=mode)
    np.testing.assert_array_equal(result(text, {"x": X}, p=np.array([0, -2, 2, 0, 1, -1])), expected)


@pytest.mark.parametrize("mode", ["constant", "edge"])
@pytest.mark.parametrize("pads", [[0, 1, 2, 0, 1, 1], [0, -2, 3, 0, 4, 0]])
def test_computed_pads(mode, pads):
    text = graph("float[3,6,7] x, int64[6] p, float v", "float[3,8,10] y", f'y = Pad<mode="{mode}">(x, p, v)')
    kept = X[:, max(-pads[1], 0) :]
    around = [(max(pads[at], 0), pads[at + 3]) for at in range(3)]
    expected = np.pad(kept, around, mode=mode, **({"constant_values": 2.5} if mode == "constant" else {}))
    np.testing.assert_array_equal(result(text, {"x": X, "p": np.array(pads), "v": np.array(2.5, np.float32)}), expected)


@pytest.mark.parametrize("kind", ["float", "int32"])
def test_a_computed_value(kind):
    x = (X * 3).astype(np.float32 if kind == "float" else np.int32)
    text = graph(f"{kind}[3,6,7] x, {kind} v", f"{kind}[3,7,9] y", "y = Pad(x, p, v)")
    check(text, {"x": x, "v": np.array(5, x.dtype)}, p=np.array([0, 1, 1, 0, 0, 1]))


def test_pads_of_infinity():
    check(graph("float[3,6,7] x", "float[3,6,8] y", "y = Pad(x, p, v)"), {"x": X}, p=np.array([0, 0, 1, 0, 0, 0]), v=np.float32(-np.inf))


@pytest.mark.parametrize(
    ("inputs", "outputs", "body", "reason"),
    [
        ("float[4] x", "float[1] y", "z = Slice(x, c, c) y = ReduceSum(z)", "an empty tensor"),
        ("float[4] x, int64[1] a", "float[3] y", "y = Slice(x, c, d, a)", "computed 'axes'"),
        ("float[4] x, int64[2] p", "float[6] y", 'y = Pad<mode="reflect">(x, p)', "computed 'pads'"),
        ("float[4] x", "float[6] y", 'y = Pad<mode="odd">(x, p)', "mode 'odd'"),
    ],
)
def test_refusals(inputs, outputs, body, reason):
    refused(graph(inputs, outputs, body), reason, c=np.array([1]), d=np.array([4]), **({} if " p" in inputs else {"p": np.array([1, 1])}))


def test_half_precision():
    text = graph("float[3,6,7] x", "float[3,4,9] y", 's = Slice(x, b, e, a) y = Pad<mode="reflect">(s, p)')
    check(text, {"x": X}, half=True, b=np.array([1]), e=np.array([5]), a=np.array([1]), p=np.array([0, 0, 1, 0, 0, 1]))
