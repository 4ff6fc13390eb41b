"""Shapes, lowered and run, against ONNX's reference."""

from __future__ import annotations

import numpy as np
import pytest

from tests.targets.coreml.lowered import check
from tests.targets.coreml.lowering.moves_support import floats, graph, refused

X = floats(2, 3, 4)
TYPES = {"float": np.float32, "int32": np.int32, "bool": bool}

SHAPED = [
    ("[4,6]", "y = Reshape(x, c)", [4, 6]),
    ("[2,12]", "y = Reshape(x, c)", [0, -1]),
    ("[6,4]", "y = Reshape<allowzero=1>(x, c)", [6, -1]),
    ("[2,1,3,4,1]", "y = Unsqueeze(x, c)", [1, -1]),
    ("[2,1,3,4]", "y = Unsqueeze(x, c)", [-3]),
    ("[24]", "y = Reshape(x, c)", [-1]),
    ("[6,4]", "y = Flatten<axis=2>(x)", [0]),
    ("[1,24]", "y = Flatten<axis=0>(x)", [0]),
    ("[6,4]", "y = Flatten<axis=-1>(x)", [0]),
    ("[4,3,2]", "y = Transpose(x)", [0]),
    ("[3,4,2]", "y = Transpose<perm=[1,2,0]>(x)", [0]),
    ("[5,2,3,4]", "y = Expand(x, c)", [5, 1, 3, 1]),
    ("[2,6,8]", "y = Tile(x, c)", [1, 2, 2]),
    ("[2,3,4]", "y = Identity(x)", [0]),
    ("[2,3,4]", "y = Trilu(x)", [0]),
    ("[2,3,4]", "y = Trilu<upper=0>(x)", [0]),
]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("shape", "body", "constant"), SHAPED)
def test_shapes(shape, body, constant, kind):
    x = (X * 3).astype(TYPES[kind])
    check(graph(f"{kind}[2,3,4] x", f"{kind}{shape} y", body), {"x": x}, c=np.array(constant))


@pytest.mark.parametrize(
    ("shape", "body", "target"), [("4,6", "Reshape", [4, -1]), ("5,2,3,4", "Expand", [5, 1, 1, 1]), ("2,6,8", "Tile", [1, 2, 2])]
)
def test_a_computed_target_is_the_static_shape_of_the_result(shape, body, target):
    text = graph(f"float[2,3,4] x, int64[{len(target)}] s", f"float[{shape}] y", f"y = {body}(x, s)")
    check(text, {"x": X, "s": np.array(target)})


@pytest.mark.parametrize(("axes", "shape"), [([0, -1], "3"), ([0], "3,1"), (None, "3")])
def test_squeeze(axes, shape):
    text = graph("float[1,3,1] x", f"float[{shape}] y", "y = Squeeze(x)" if axes is None else "y = Squeeze(x, a)")
    check(text, {"x": floats(1, 3, 1)}, **({} if axes is None else {"a": np.array(axes)}))


def test_scalars():
    check(graph("float[1,1] x", "float y", "y = Squeeze(x)"), {"x": floats(1, 1)})
    check(graph("float x", "float[1] y", "y = Unsqueeze(x, a)"), {"x": np.array(3, np.float32)}, a=np.array([0]))
    check(graph("float x", "float[2,3] y", "y = Expand(x, s)"), {"x": np.array(3, np.float32)}, s=np.array([2, 3]))
    check(graph("float x", "float[1,1] y", "y = Flatten<axis=0>(x)"), {"x": np.array(3, np.float32)})


@pytest.mark.parametrize("k", [-5, -2, -1, 0, 1, 2, 4])
@pytest.mark.parametrize("upper", [0, 1])
@pytest.mark.parametrize("known", [True, False])
def test_trilu_keeps_infinities_out(k, upper, known):
    x = np.where(X > 0.5, np.inf, X).astype(np.float32)
    text = graph("float[2,3,4] x" + ("" if known else ", int64 k"), "float[2,3,4] y", f"y = Trilu<upper={upper}>(x, k)")
    check(text, {"x": x} | ({} if known else {"k": np.array(k)}), **({"k": np.array(k)} if known else {}))


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("kind", TYPES)
def test_concat(axis, kind):
    shape = [2, 3, 4]
    shape[axis] *= 3
    x = (X * 3).astype(TYPES[kind])
    dims = ",".join(map(str, shape))
    check(
        graph(f"{kind}[2,3,4] x, {kind}[2,3,4] z", f"{kind}[{dims}] y", f"y = Concat<axis={axis}>(x, z, x)"),
        {"x": x, "z": ~x if kind == "bool" else -x},
    )


def test_concat_leaves_empty_constants_out():
    check(graph("float[2,3] x", "float[4,3] y", "y = Concat<axis=0>(e, x, x)"), {"x": floats(2, 3)}, e=np.zeros((0, 3), np.float32))


@pytest.mark.parametrize(
    ("body", "sizes"),
    [("<axis=1>(x, s)", (1, 4, 2)), ("<axis=1, num_outputs=3>(x)", (3, 3, 1)), ("<axis=-1, num_outputs=2>(x)", (2, 2))],
)
def test_split(body, sizes):
    shapes = [f"2,{size},4" if "axis=1" in body else f"2,7,{size}" for size in sizes]
    names = [f"y{at}" for at in range(len(sizes))]
    outputs = ", ".join(f"float[{shape}] {name}" for shape, name in zip(shapes, names, strict=True))
    constants = {"s": np.array(sizes)} if "s)" in body else {}
    check(graph("float[2,7,4] x", outputs, f"{', '.join(names)} = Split{body}"), {"x": floats(2, 7, 4)}, **constants)


@pytest.mark.parametrize("attributes", ["", "<start=1>", "<start=-2, end=-1>", "<end=2>"])
def test_shape_and_size_are_known(attributes):
    count = len(
        np.array([2, 3, 4])[
            {"": slice(None), "<start=1>": slice(1, None), "<start=-2, end=-1>": slice(-2, -1), "<end=2>": slice(2)}[attributes]
        ]
    )
    check(graph("float[2,3,4] x", f"int64[{count}] y, int64 z", f"y = Shape{attributes}(x) z = Size(x)"), {"x": X})


@pytest.mark.parametrize("kind", ["float", "int32"])
@pytest.mark.parametrize(
    "body", ['DepthToSpace<blocksize=2, mode="DCR">', 'DepthToSpace<blocksize=2, mode="CRD">', "DepthToSpace<blocksize=1>"]
)
def test_depth_to_space(body, kind):
    x = np.arange(2 * 12 * 2 * 3).reshape(2, 12, 2, 3).astype(TYPES[kind])
    shape = "2,12,2,3" if "=1" in body else "2,3,4,6"
    check(graph(f"{kind}[2,12,2,3] x", f"{kind}[{shape}] y", f"y = {body}(x)"), {"x": x})


@pytest.mark.parametrize("kind", ["float", "int32"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_space_to_depth(size, kind):
    x = np.arange(2 * 3 * 6 * 12).reshape(2, 3, 6, 12).astype(TYPES[kind])
    shape = f"2,{3 * size**2},{6 // size},{12 // size}"
    check(graph(f"{kind}[2,3,6,12] x", f"{kind}[{shape}] y", f"y = SpaceToDepth<blocksize={size}>(x)"), {"x": x})


@pytest.mark.parametrize(("shape", "target", "axes"), [("3,2,7", [3, 2, 7], None), ("5,3,2", [5, 2], "0,-1"), ("1,6,4", [1, 6], "0,1")])
@pytest.mark.parametrize("kind", TYPES)
def test_center_crop_pad(shape, target, axes, kind):
    attributes = f"<axes=[{axes}]>" if axes else ""
    x = (X * 3).astype(TYPES[kind])
    check(graph(f"{kind}[2,3,4] x", f"{kind}[{shape}] y", f"y = CenterCropPad{attributes}(x, s)"), {"x": x}, s=np.array(target))


@pytest.mark.parametrize(
    ("attribute", "kind"),
    [
        ("value=float[2]{1,2}", "float"),
        ("value_floats=[1.5,2.0]", "float"),
        ("value_ints=[3,4]", "int64"),
        ("value_int=7", "int64"),
        ("value_float=0.5", "float"),
    ],
)
def test_constant(attribute, kind):
    x = np.array([2, 5]).astype(np.float32 if kind == "float" else np.int64)
    check(graph(f"{kind}[2] x", f"{kind}[2] y", f"c = Constant<{attribute}>() y = Add(x, c)"), {"x": x})


@pytest.mark.parametrize(
    ("inputs", "outputs", "body", "reason"),
    [
        ("float[1,12,2,2] x", "float[1,3,4,4] y", 'y = DepthToSpace<blocksize=2, mode="ABC">(x)', "mode 'ABC'"),
    ],
)
def test_refusals(inputs, outputs, body, reason):
    refused(graph(inputs, outputs, body), reason)


def test_an_empty_part_of_a_split_is_left_out():
    check(graph("float[2,3] x", "float[2,3] y", "a, y = Split<axis=0>(x, s)"), {"x": floats(2, 3)}, s=np.array([0, 2]))


def test_half_precision():
    check(graph("float[2,3,4] x", "float[4,6] y", "t = Transpose(x) y = Reshape(t, c)"), {"x": X}, half=True, c=np.array([4, 6]))
