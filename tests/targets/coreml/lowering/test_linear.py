"""Products of matrices against numpy and ONNX's reference: all ranks, transposes and constants, and any equation of Einsum."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.errors import UnsupportedOpError
from edgekit.targets.coreml.convert import Converted
from tests.targets.coreml.lowered import check, lower
from tests.targets.coreml.node_text import floats, model_of, of_shape, text


def operators(converted: Converted) -> set[str]:
    """The types of a program's operations."""
    function = converted.model.get_spec().mlProgram.functions["main"]
    return {operation.type for block in function.block_specializations.values() for operation in block.operations}


PRODUCTS = [
    ((3, 4), (4, 5)),
    ((2, 3, 4), (4, 5)),
    ((2, 3, 3, 4), (4, 5)),
    ((2, 3, 4), (2, 4, 5)),
    ((2, 1, 3, 4), (3, 4, 5)),
    ((2, 1, 2, 3, 4), (3, 1, 4, 5)),
    ((4,), (4, 5)),
    ((4,), (3, 4, 5)),
    ((2, 3, 4), (4,)),
    ((4,), (4,)),
]


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize(("one", "two"), PRODUCTS)
def test_matmul(one: tuple[int, ...], two: tuple[int, ...], constant: bool) -> None:
    x, y = floats(*one), floats(*two, seed=1)
    declared = f"{of_shape(one)} a" + ("" if constant else f", {of_shape(two)} b")
    check(text("y = MatMul(a, b)", declared), {"a": x} | ({} if constant else {"b": y}), **({"b": y} if constant else {}))


def test_a_constant_weight_makes_a_linear_layer() -> None:
    assert "linear" in operators(check(text("y = MatMul(a, b)", "float[2,3,4] a"), {"a": floats(2, 3, 4)}, half=True, b=floats(4, 5)))


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_matmul_of_integers(dtype: str) -> None:
    a, b = (np.random.default_rng(seed).integers(-9, 9, (3, 3)).astype(dtype) for seed in (0, 1))
    check(text("y = MatMul(a, b)", f"{dtype}[3,3] a, {dtype}[3,3] b", f"{dtype}[] y"), {"a": a, "b": b})


@pytest.mark.parametrize("body", ["y = MatMul(a, b)", "y = Gemm(a, b)"])
def test_unsigned_integers_are_refused(body: str) -> None:
    with pytest.raises(UnsupportedOpError, match="UINT32"):
        lower(model_of(text(body, "uint32[3,3] a, uint32[3,3] b", "uint32[] y")))


ADDED = {"none": None, "row": (5,), "scalar": (), "wide row": (1, 5), "column": (3, 1)}


@pytest.mark.parametrize("constants", ["", "bc"])
@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("attributes", ["alpha = 0.5, beta = 2.0, transA = 1", "transB = 1"])
def test_gemm(attributes: str, added: str, constants: str) -> None:
    arrays = {
        "a": floats(*(4, 3) if "transA" in attributes else (3, 4)),
        "b": floats(*(5, 4) if "transB" in attributes else (4, 5), seed=1),
    }
    shape = ADDED[added]
    if shape is not None:
        arrays["c"] = floats(*shape, seed=2)
    inputs = {name: array for name, array in arrays.items() if name not in constants}
    declared = ", ".join(f"{of_shape(array.shape) if array.shape else 'float'} {name}" for name, array in inputs.items())
    held = {name: array for name, array in arrays.items() if name in constants}
    check(text(f"y = Gemm<{attributes}>({', '.join(arrays)})", declared), inputs, **held)


def test_gemm_with_a_factor_beyond_float16_stays_in_float32() -> None:
    model = text("y = Gemm<alpha = 1e6>(a, b)", "float[2,3] a")
    check(model, {"a": floats(2, 3, scale=1e-4)}, half=True, b=floats(3, 4, seed=1))


EQUATIONS = [
    ("ij,jk->ik", [(3, 4), (4, 5)]),
    ("ij,jk", [(3, 4), (4, 5)]),
    ("ij,kj->ki", [(3, 4), (5, 4)]),
    ("bhqd,bhkd->bhqk", [(2, 3, 4, 5), (2, 3, 6, 5)]),
    ("bqhd,bkhd->bhqk", [(2, 4, 3, 5), (2, 6, 3, 5)]),
    ("nchw,nwhu->nchu", [(2, 3, 4, 5), (2, 5, 4, 3)]),
    ("bij,bjk->bik", [(1, 3, 4), (2, 4, 5)]),
    ("abij,abjk->ik", [(2, 3, 2, 4), (2, 3, 4, 3)]),
    ("abc,dcb->ad", [(2, 3, 4), (5, 4, 3)]),
    ("i,j->ij", [(3,), (4,)]),
    ("i,i->", [(3,), (3,)]),
    ("i,i->i", [(3,), (3,)]),
    ("ij->ji", [(3, 4)]),
    ("ij->", [(3, 4)]),
    ("ij->j", [(3, 4)]),
    ("ii->i", [(3, 3)]),
    ("ii", [(3, 3)]),
    ("bii->bi", [(2, 3, 3)]),
    ("iii->i", [(3, 3, 3)]),
    ("iji,jk->ik", [(3, 2, 3), (2, 4)]),
    ("...ij,...jk->...ik", [(2, 3, 4), (5, 2, 4, 3)]),
    ("...ij,...jk", [(1, 3, 4), (5, 2, 4, 3)]),
    ("i...,i...->...", [(3, 2, 4), (3, 4)]),
    ("...->...", [(2, 3)]),
    ("ab,bc,cd->ad", [(2, 3), (3, 4), (4, 5)]),
    ("ab,ab,ab->a", [(2, 3), (2, 3), (2, 3)]),
    ("ab,cd->", [(2, 3), (4, 5)]),
    ("abc,ad->bcd", [(2, 3, 4), (2, 5)]),
    ("zyx, xyz -> y", [(2, 3, 4), (4, 3, 2)]),
]


@pytest.mark.parametrize(("equation", "shapes"), EQUATIONS, ids=[equation for equation, _ in EQUATIONS])
def test_einsum(equation: str, shapes: list[tuple[int, ...]]) -> None:
    inputs = {f"x{index}": floats(*shape, seed=index) for index, shape in enumerate(shapes)}
    declared = ", ".join(f"{of_shape(array.shape)} {name}" for name, array in inputs.items())
    expected = np.einsum(equation.replace(" ", ""), *(array.astype(np.float64) for array in inputs.values()))
    output = "float y" if expected.ndim == 0 else f"{of_shape(expected.shape)} y"
    check(text(f'y = Einsum<equation = "{equation}">({", ".join(inputs)})', declared, output), inputs)


def test_einsum_takes_batches_as_they_lie() -> None:
    inputs = {"q": floats(1, 2, 3, 4), "k": floats(1, 2, 5, 4)}
    converted = check(text('y = Einsum<equation = "bhqd,bhkd->bhqk">(q, k)', "float[1,2,3,4] q, float[1,2,5,4] k"), inputs)
    assert operators(converted) & {"reshape", "transpose"} == set()


def test_einsum_of_integers() -> None:
    a, b = (np.random.default_rng(seed).integers(-9, 9, (3, 3)).astype(np.int32) for seed in (0, 1))
    check(text('y = Einsum<equation = "ij,jk->ki">(a, b)', "int32[3,3] a, int32[3,3] b", "int32[] y"), {"a": a, "b": b})


def test_einsum_with_too_many_axes_in_between_is_refused() -> None:
    declared = "float[2,2,2,2] a, float[2,2,2,2] b, float[2,2,2,2,2] c"
    with pytest.raises(UnsupportedOpError, match="rank 6"):
        lower(model_of(text('y = Einsum<equation = "abcd,aefg,bcefg->d">(a, b, c)', declared, "float[2] y")))
