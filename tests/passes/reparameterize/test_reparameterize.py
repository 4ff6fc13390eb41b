"""The composite: one family makes room for another, places and families are left out by name, a wrong family is caught."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import edgekit
from edgekit.contracts import Context, Effect, Pass
from edgekit.errors import ParityError, PassError, UsageError
from edgekit.graph.constants import GraphEditor, constant_array
from edgekit.graph.interpreter import run
from edgekit.graph.shapes import infer_shapes
from edgekit.passes.reparameterize import reparameterize
from edgekit.passes.reparameterize.reparameterize import FAMILIES, Reparameterize

BLOCK = """
<ir_version: 10, opset_import: ["" : 23]>
block (float[1,4,6,6] x) => (float[1,4,6,6] y)
{
    wide = Conv<pads = [1,1,1,1]>(x, w3)
    narrow = Conv(x, w1)
    normal = BatchNormalization(x, s, t, m, v)
    sum = Add(wide, narrow)
    all = Add(sum, normal)
    scaled = Mul(all, layer_scale)
    y = Add(scaled, x)
}
"""


@pytest.fixture
def block() -> ir.Model:
    rng = np.random.default_rng(0)
    arrays = {"w3": rng.normal(size=(4, 4, 3, 3)), "w1": rng.normal(size=(4, 4, 1, 1)), "layer_scale": rng.normal(size=(1, 4, 1, 1))}
    arrays |= {"s": rng.normal(size=4), "t": rng.normal(size=4), "m": rng.normal(size=4), "v": rng.uniform(0.5, 1, 4)}
    proto = onnx.parser.parse_model(BLOCK)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items())
    model = ir.from_proto(proto)
    infer_shapes(model)
    for node in model.graph:
        node.name = node.outputs[0].name
    return model


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_one_family_makes_room_for_another(block: ir.Model) -> None:
    inputs = {"x": np.random.default_rng(1).normal(size=(1, 4, 6, 6)).astype(np.float32)}
    expected, context = run(block, inputs)["y"], Context()
    assert Reparameterize().apply(block, context) == len(context.rewrites) >= 2
    assert operators(block) == ["Conv"]
    assert set(context.rules) <= {family.name for family in FAMILIES}
    assert sum(context.rules.values()) == len(context.rewrites)
    np.testing.assert_allclose(run(block, inputs)["y"], expected, rtol=0, atol=1e-5)
    assert Reparameterize().apply(block, Context()) == 0


def test_places_are_left_out_by_the_names_that_the_report_gives(block: ir.Model) -> None:
    first, again = Context(), block.clone()
    Reparameterize().apply(block, first)
    assert all(place.split(": ")[0] in {family.name for family in FAMILIES} for place in first.rewrites)
    second = Context(skip=frozenset(first.rewrites))
    Reparameterize().apply(again, second)
    assert not set(first.rewrites) & set(second.rewrites)


def test_families_are_left_out_by_name(block: ir.Model) -> None:
    context = Context()
    Reparameterize(without=("merge-branches", "fold-scale")).apply(block, context)
    assert operators(block).count("Conv") == 2
    assert not {"merge-branches", "fold-scale"} & set(context.rules)
    with pytest.raises(UsageError, match="did you mean 'merge-branches'"):
        Reparameterize(without=("merge-branchs",))


@dataclass(frozen=True)
class Wrong(Pass):
    """Doubles the first weight of every convolution."""

    name: ClassVar[str] = "double-weights"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, model: ir.Model, context: Context) -> int:
        found = 0
        for node in model.graph:
            if node.op_type == "Conv" and "doubled" not in node.metadata_props and not context.skips(node.name or ""):
                array = constant_array(node.inputs[1])
                assert array is not None
                GraphEditor(model).set_constant(node, 1, array * 2)
                node.metadata_props["doubled"] = "1"
                context.applied(node.name or "")
                found += 1
        return found


@dataclass(frozen=True)
class Breaking(Wrong):
    """Replaces each Conv by a part that is none."""

    name: ClassVar[str] = "break-convolutions"

    def apply(self, model: ir.Model, context: Context) -> int:
        nodes = [node for node in model.graph if node.op_type == "Conv"]
        for node in nodes:
            node.op_type = "Sum"
        return len(nodes)


def test_a_wrong_family_is_caught_and_named(block: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ir.save(block, tmp_path / "block.onnx")
    monkeypatch.setattr(reparameterize, "FAMILIES", (*FAMILIES, Wrong))
    with pytest.raises(ParityError, match="reparameterize"):
        edgekit.compile(tmp_path / "block.onnx", target="onnxruntime", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    spared = 'reparameterize{without=["double-weights"]}'
    assert edgekit.compile(tmp_path / "block.onnx", target="onnxruntime", passes=[spared], calibration=2)


def test_a_family_that_breaks_a_whole_operator_is_named(block: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reparameterize, "FAMILIES", (Breaking,))
    with pytest.raises(PassError, match="'break-convolutions' broke whole operators into parts: Conv 2 → 0"):
        Reparameterize().apply(block, Context())
