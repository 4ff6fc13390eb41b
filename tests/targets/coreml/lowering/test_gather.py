"""Reading by index, lowered and run, against ONNX's reference and numpy."""

from __future__ import annotations

import numpy as np
import pytest

from tests.targets.coreml.lowered import check
from tests.targets.coreml.lowering.moves_support import floats, graph, refused, result

X = floats(3, 4, 5)


@pytest.mark.parametrize("version", ["iOS15", "iOS17"])
@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
@pytest.mark.parametrize("known", [True, False])
def test_gather_counts_negative_indices_from_the_end(version, axis, shape, known):
    size = X.shape[axis]
    indices = np.random.default_rng(1).integers(-size, size, shape)
    dims = ",".join(map(str, shape))
    kind = f"int64[{dims}]" if shape else "int64"
    out = ",".join(map(str, np.take(X, indices, axis).shape))
    inputs = {"x": X} if known else {"x": X, "i": indices}
    text = graph("float[3,4,5] x" + ("" if known else f", {kind} i"), f"float[{out}] y", f"y = Gather<axis={axis}>(x, i)")
    check(text, inputs, version=version, **({"i": indices} if known else {}))


@pytest.mark.parametrize("name", ["int32", "bool", "float16"])
def test_gather_of_other_types(name):
    x = (X > 0) if name == "bool" else (X * 10).astype(name)
    check(
        graph(f"{name}[3,4,5] x, int64[2,2] i", f"{name}[3,2,2,5] y", "y = Gather<axis=1>(x, i)"),
        {"x": x, "i": np.array([[0, -1], [3, 1]])},
    )


@pytest.mark.parametrize("indices", [[1, 3], [0, 1, 2], [2, 0, 2]])
def test_known_indices_that_are_evenly_spaced_are_a_slice(indices):
    found = check(graph("float[3,4,5] x", f"float[3,{len(indices)},5] y", "y = Gather<axis=1>(x, i)"), {"x": X}, i=np.array(indices))
    operators = {op.op_type for op in found.model._mil_program.functions["main"].operations}
    assert ("gather" in operators) == (indices == [2, 0, 2])


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("smaller", [False, True])
def test_gather_elements(axis, smaller):
    shape = [2 if smaller else size for size in X.shape]
    shape[axis] = 6
    indices = np.random.default_rng(2).integers(-X.shape[axis], X.shape[axis], shape)
    dims = ",".join(map(str, shape))
    text = graph(f"float[3,4,5] x, int64[{dims}] i", f"float[{dims}] y", f"y = GatherElements<axis={axis}>(x, i)")
    covered = X[tuple(slice(None) if at == axis % 3 else slice(size) for at, size in enumerate(shape))]
    np.testing.assert_array_equal(result(text, {"x": X, "i": indices}), np.take_along_axis(covered, indices, axis))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("batch", "index_shape"), [(0, (2, 3)), (0, (2, 2, 2)), (1, (3, 2, 1)), (1, (3, 2, 2)), (2, (3, 4, 2, 1))])
def test_gather_nd(batch, index_shape, known):
    depth = index_shape[-1]
    random = np.random.default_rng(3)
    indices = np.stack([random.integers(-X.shape[batch + at], X.shape[batch + at], index_shape[:-1]) for at in range(depth)], -1)
    out = ",".join(map(str, index_shape[:-1] + X.shape[batch + depth :]))
    declared = "" if known else f", int64[{','.join(map(str, index_shape))}] i"
    text = graph(f"float[3,4,5] x{declared}", f"float[{out}] y", f"y = GatherND<batch_dims={batch}>(x, i)")
    check(text, {"x": X} | ({} if known else {"i": indices}), **({"i": indices} if known else {}))


@pytest.mark.parametrize(
    "values", [np.array([0, 1], np.float32), np.array([-2.5, 7], np.float32), np.array([3, 9]), np.array([False, True])]
)
@pytest.mark.parametrize("axis", [-1, 0])
def test_one_hot_leaves_rows_of_indices_out_of_range_off(values, axis):
    indices = np.array([[0, -1, 3], [4, -5, 2]])  # onnx's reference wraps 4 and -5 around; the specification says `off`
    name = {"f": "float", "i": "int64", "b": "bool"}[values.dtype.kind]
    shape = "2,3,4" if axis == -1 else "4,2,3"
    found = result(
        graph("int64[2,3] i", f"{name}[{shape}] y", f"y = OneHot<axis={axis}>(i, d, v)"), {"i": indices}, d=np.array([4]), v=values
    )
    wrapped = np.where(indices < 0, indices + 4, indices)
    expected = np.where(wrapped[..., None] == np.arange(4), values[1], values[0])
    np.testing.assert_array_equal(found, np.moveaxis(expected, -1, axis))


def test_one_hot_of_float_indices_and_computed_values():
    inputs = {"i": np.array([1.0, 2.9, -1.0], np.float32), "v": np.array([0.5, 2], np.float32)}
    found = result(graph("float[3] i, float[2] v", "float[3,3] y", "y = OneHot(i, d, v)"), inputs, d=np.array(3))
    np.testing.assert_array_equal(found, [[0.5, 2, 0.5], [0.5, 0.5, 2], [0.5, 0.5, 2]])


@pytest.mark.parametrize(("attributes", "shape"), [("<axis=1>", "3,2,5"), ("<axis=-1>", "3,4,2"), ("", "2")])
def test_compress(attributes, shape):
    check(graph("float[3,4,5] x", f"float[{shape}] y", f"y = Compress{attributes}(x, c)"), {"x": X}, c=np.array([False, True, True, False]))


@pytest.mark.parametrize(("attributes", "lengths"), [("", [1, 3, 2, 3]), ("<batch_axis=0, time_axis=1>", [4, 1, 2])])
@pytest.mark.parametrize("known", [True, False])
def test_reverse_sequence(attributes, lengths, known):
    lengths = np.array(lengths)
    text = graph(
        "float[3,4,5] x" + ("" if known else f", int64[{len(lengths)}] n"), "float[3,4,5] y", f"y = ReverseSequence{attributes}(x, n)"
    )
    check(text, {"x": X} | ({} if known else {"n": lengths}), **({"n": lengths} if known else {}))


CREATED = {
    "float[3,4] x": [("float[3,4] y", "y = EyeLike(x)"), ("int32[3,4] y", "y = EyeLike<k=-1, dtype=6>(x)")],
    "float[2] x": [("int64[2,3] y", "y = ConstantOfShape<value=int64[1]{7}>(s)"), ("float[2,3] y", "y = ConstantOfShape(s)")],
}


@pytest.mark.parametrize(("inputs", "outputs", "body"), [(key, *case) for key, cases in CREATED.items() for case in cases])
def test_created_tensors(inputs, outputs, body):
    shape = (3, 4) if "3,4" in inputs else (2,)
    check(graph(inputs, f"{outputs}, {inputs.replace(' x', ' z')}", f"{body} z = Relu(x)"), {"x": floats(*shape)}, s=np.array([2, 3]))


@pytest.mark.parametrize(("start", "limit", "step"), [(2, 11, 3), (10, 3, -2), (1.5, 4.0, 0.5)])
@pytest.mark.parametrize("known", [True, False])
def test_range(start, limit, step, known):
    kind = "float" if isinstance(start, float) else "int64"
    arrays = {
        name: np.array(value, np.float32 if kind == "float" else np.int64) for name, value in zip("abc", (start, limit, step), strict=True)
    }
    count = len(np.arange(start, limit, step))
    if known:
        check(graph(f"{kind} w", f"{kind}[{count}] y", "r = Range(a, b, c) y = Add(r, w)"), {"w": arrays["a"]}, **arrays)
    else:
        check(graph(f"{kind} a, {kind} b, {kind} c", f"{kind}[{count}] y", "y = Range(a, b, c)"), arrays)


@pytest.mark.parametrize(
    ("inputs", "outputs", "body", "reason"),
    [
        ("float[2,3] x", "int64[2,N] y", "y = NonZero(x)", "Core ML needs|NonZero"),
        ("float[4] x, bool[4] c", "float[2] y", "y = Compress(x, c)", "computed 'condition'"),
        ("float[4] x", "float[4] y", "y = RandomNormalLike(x)", "random numbers"),
        ("float[4] x", "float[4] y", "y = RandomUniformLike(x)", "random numbers"),
        ("float[4] x", "float[4] y", "y = Unique(x)", "Unique"),
        ("float[4] x", "float[1] y", "i = Constant<value=int64[1]{4}>() y = Gather(x, i)", "out of range"),
    ],
)
def test_refusals(inputs, outputs, body, reason):
    refused(graph(inputs, outputs, body), reason)


def test_an_empty_selection_is_left_out():
    text = graph("float[4] x", "float[4] y", "i = Constant<value=int64[0]{}>() z = Gather(x, i) y = Concat<axis=0>(z, x)")
    check(text, {"x": floats(4)})


def test_half_precision():
    check(graph("float[3,4,5] x, int64[2] i", "float[3,2,5] y", "y = Gather<axis=1>(x, i)"), {"x": X, "i": np.array([-1, 2])}, half=True)
