"""Whole operators are counted, and what an exact pass may not lose is told from what it declares to remove."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from edgekit import contracts
from edgekit.contracts import Context, Effect
from edgekit.graph.canonicalize import canonicalize
from edgekit.graph.census import WHOLE, census, losses, whole_nodes
from edgekit.graph.shapes import infer_shapes
from edgekit.stages import canonical_graph, open_graph
from tests.conftest import tiny_model

BLOCK = """
<ir_version: 10, opset_import: ["" : 23]>
block (float[1, 5, 8] x) => (float[1, 5, 8] y)
<float[8] g = {1, 2, 1, 2, 1, 2, 1, 2}, float[8] h = {0, 1, 0, 1, 0, 1, 0, 1}>
{
    n = LayerNormalization<axis = -1>(x, g, h)
    a = Attention<q_num_heads = 2, kv_num_heads = 2>(n, n, n)
    r = Add(x, a)
    m = RMSNormalization<axis = -1>(r, g)
    u = Gelu<approximate = "tanh">(m)
    y = Softmax(u)
}
"""
CONVOLUTIONS = """
<ir_version: 10, opset_import: ["" : 23]>
net (float[1, 4, 6, 6] x) => (float[1, 2, 12, 12] y)
<float[4] g = {1, 2, 3, 4}, float[4] h = {0, 1, 0, 1}, float[4] m = {0.1, 0.2, 0.3, 0.4}, float[4] v = {1, 2, 1, 2}>
{
    w = ConstantOfShape<value = float[1] {0.1}>(s)
    c = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w)
    n = BatchNormalization(c, g, h, m, v)
    a = HardSwish(n)
    i = InstanceNormalization(a, g, h)
    p = GroupNormalization<num_groups = 2>(i, g, h)
    r = LeakyRelu<alpha = 0.1>(p)
    k = Concat<axis = 1>(r, x)
    y = DepthToSpace<blocksize = 2>(k)
}
""".replace(
    "{0.1, 0.2, 0.3, 0.4}, float[4] v = {1, 2, 1, 2}>", "{0.1, 0.2, 0.3, 0.4}, float[4] v = {1, 2, 1, 2}, int64[4] s = {4, 4, 3, 3}>"
)


def parsed(text: str) -> ir.Model:
    model = ir.from_proto(onnx.parser.parse_model(text))
    infer_shapes(model)
    return model


def test_every_name_is_an_operator_of_onnx() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    assert known >= WHOLE


def test_whole_operators_are_counted_and_parts_are_not() -> None:
    found = census(whole_nodes(parsed(BLOCK)))
    assert found == {"Attention": 1, "Gelu": 1, "LayerNormalization": 1, "RMSNormalization": 1, "Softmax": 1}
    assert list(found) == sorted(found)


def test_operators_of_edgekit_count_and_foreign_ones_do_not() -> None:
    model = parsed(BLOCK)
    node = next(node for node in model.graph if node.op_type == "Gelu")
    node.domain = "edgekit"
    assert census(whole_nodes(model))["edgekit.Gelu"] == 1
    node.domain = "com.acme"
    assert not {"Gelu", "edgekit.Gelu", "com.acme.Gelu"} & census(whole_nodes(model)).keys()


def test_losses_name_the_nodes_and_heed_what_is_declared() -> None:
    model = parsed(BLOCK)
    for node in model.graph:
        node.name = f"block/{node.op_type}"
    before = whole_nodes(model)
    next(node for node in model.graph if node.op_type == "Attention").op_type = "Sum"
    after = whole_nodes(model)
    (loss,) = losses(before, after)
    assert (loss.operator, loss.before, loss.after, loss.gone) == ("Attention", 1, 0, ("block/Attention",))
    assert str(loss) == "Attention 1 → 0"
    assert losses(before, after, {"Attention"}) == []
    assert losses(after, before) == []


def models() -> dict[str, ir.Model]:
    found = {name: canonical_graph(open_graph(name).graph) for name in ("vit_digits", "mobileone_digits")}
    texts = {"block": BLOCK, "convolutions": CONVOLUTIONS}
    found |= {name: canonicalize(parsed(text)) for name, text in texts.items()}
    found["tiny"] = canonicalize(ir.from_proto(tiny_model()))
    for model in found.values():
        infer_shapes(model)
    return found


@pytest.fixture(scope="module")
def zoo() -> dict[str, ir.Model]:
    return models()


EXACT = sorted(name for name, cls in contracts.passes.load_all()[0].items() if cls.effect is Effect.EXACT)


REWRITING = ("drop-dead-work", "fold-batch-norm", "fold-input-affine", "merge-branches", "reparameterize")
"""Passes that find something in these graphs; those of rarer forms are held to their promise in their own tests too."""


def test_the_zoo_has_whole_operators_to_lose(zoo: dict[str, ir.Model]) -> None:
    kinds = set().union(*(census(whole_nodes(model)) for model in zoo.values()))
    assert kinds >= {"Attention", "BatchNormalization", "Conv", "DepthToSpace", "Gelu", "GroupNormalization", "HardSwish"}
    assert kinds >= {"InstanceNormalization", "LayerNormalization", "LeakyRelu", "RMSNormalization", "Softmax"}
    assert census(whole_nodes(zoo["vit_digits"]))["Attention"] == 6


@pytest.mark.parametrize("name", EXACT)
def test_no_exact_pass_loses_a_whole_operator_that_it_does_not_declare(name: str, zoo: dict[str, ir.Model]) -> None:
    item = contracts.passes.get(name)
    assert item.removes <= WHOLE
    rewrites, removed = 0, set()
    for label, source in zoo.items():
        model = source.clone()
        before = whole_nodes(model)
        rewrites += item().apply(model, Context())
        after = whole_nodes(model)
        assert losses(before, after, item.removes) == [], label
        removed |= {loss.operator for loss in losses(before, after)}
    assert removed <= item.removes
    assert rewrites > 0 or name not in REWRITING, "the pass matches nowhere in the zoo: give this test a graph that it rewrites"
