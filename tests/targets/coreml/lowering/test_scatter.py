"""Writing by index, lowered and run, against ONNX's reference."""

from __future__ import annotations

import numpy as np
import pytest

from tests.targets.coreml.lowered import check
from tests.targets.coreml.lowering.moves_support import floats, graph, refused

REDUCTIONS = ["none", "add", "mul", "max", "min"]
X = floats(3, 4, 5)


def _indices(shape: tuple[int, ...], axis: int, size: int) -> np.ndarray:
    """Without duplicates along the axis: which of two updates of one element wins is not defined."""
    random = np.random.default_rng(1)
    order = np.argsort(random.random([size if at == axis else n for at, n in enumerate(shape)]), axis=axis)
    kept = np.take(order, np.arange(shape[axis]), axis)
    return kept - size * random.integers(0, 2, kept.shape)


@pytest.mark.parametrize("version", ["iOS15", "iOS17"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("axis", "shape"), [(0, (2, 4, 5)), (2, (3, 4, 3)), (1, (2, 3, 4)), (-1, (1, 2, 2))])
def test_scatter_elements(reduction, axis, shape, version):
    indices = _indices(shape, axis % 3, X.shape[axis])
    dims = ",".join(map(str, shape))
    text = graph(
        f"float[3,4,5] x, int64[{dims}] i, float[{dims}] u",
        "float[3,4,5] y",
        f'y = ScatterElements<axis={axis}, reduction="{reduction}">(x, i, u)',
    )
    check(text, {"x": X, "i": indices, "u": floats(*shape, seed=2)}, version=version)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_scatter_nd(reduction, depth, known):
    places = np.array([[0, 3, -1], [-1, 0, 2]])[:, :depth]
    shape = (2, *X.shape[depth:])
    dims = ",".join(map(str, shape))
    declared = "" if known else f", int64[2,{depth}] i"
    text = graph(f"float[3,4,5] x, float[{dims}] u{declared}", "float[3,4,5] y", f'y = ScatterND<reduction="{reduction}">(x, i, u)')
    inputs = {"x": X, "u": floats(*shape, seed=2)} | ({} if known else {"i": places})
    check(text, inputs, **({"i": places} if known else {}))


@pytest.mark.parametrize("reduction", ["add", "mul", "max", "min"])
def test_several_updates_of_one_element_are_all_applied(reduction):
    text = graph("float[3,2] x, float[3,2] u", "float[3,2] y", f'y = ScatterND<reduction="{reduction}">(x, i, u)')
    check(text, {"x": floats(3, 2), "u": floats(3, 2, seed=1)}, i=np.array([[1], [1], [0]]))


@pytest.mark.parametrize("kind", ["bool", "int32"])
def test_other_types(kind):
    x, u = (X[0] > 0).astype(kind), np.array([[1, 0, 1, 1, 0]]).astype(kind)
    check(graph(f"{kind}[4,5] x, {kind}[1,5] u", f"{kind}[4,5] y", "y = ScatterND(x, i, u)"), {"x": x, "u": u}, i=np.array([[-2]]))


def test_half_precision():
    text = graph("float[4,5] x, float[1,5] u", "float[4,5] y", 'y = ScatterND<reduction="add">(x, i, u)')
    check(text, {"x": X[0], "u": floats(1, 5)}, half=True, i=np.array([[3]]))


def test_refusals():
    refused(graph("float[4] x, float[1] u", "float[4] y", "y = ScatterND(x, i, u)"), "out of range", i=np.array([[4]]))
    big = "float[2,2,2,2,2] x, int64[1,1,1,1,1] i, float[1,1,1,1,1] u"
    refused(graph(big, "float[2,2,2,2,2] y", "y = ScatterElements<axis=0>(x, i, u)"), "rank 5")


@pytest.mark.parametrize("known", [True, False, None])
@pytest.mark.parametrize(("mode", "first"), [("linear", [1, 2]), ("circular", [3, 0])])
@pytest.mark.parametrize("axis", [-2, 1, 3])
def test_tensor_scatter(mode, first, known, axis):
    shape = [2, 3, 4, 5]
    shape[axis] = 2
    dims, at = ",".join(map(str, shape)), np.minimum(first, np.array([2, 3, 4, 5])[axis] - (2 if mode == "linear" else 1))
    declared = ", int64[2] w" if known is False else ""
    body = f'y = TensorScatter<axis={axis}, mode="{mode}">(x, u{"" if known is None else ", w"})'
    text = graph(f"float[2,3,4,5] x, float[{dims}] u{declared}", "float[2,3,4,5] y", body).replace(": 23", ": 24")
    inputs = {"x": floats(2, 3, 4, 5), "u": floats(*shape, seed=2)} | ({"w": at} if known is False else {})
    check(text, inputs, **({"w": at} if known else {}))


@pytest.mark.parametrize("operator", ['y = ScatterElements<reduction = "add">(x, i, u)', 'y = ScatterND<reduction = "add">(x, p, u)'])
def test_sums_of_narrow_integers_wrap(operator: str) -> None:
    """200 + 100 is 44 in eight bits, also where it is read as a float."""
    text = graph("uint8[3] x, uint8[2] u", "uint8[3] y, float[3] z", f"{operator} z = Cast<to = 1>(y)")
    constants = {"i": np.array([0, 2])} if "Elements" in operator else {"p": np.array([[0], [2]])}
    check(text, {"x": np.array([200, 7, 255], np.uint8), "u": np.array([100, 1], np.uint8)}, runtime=True, **constants)
