"""`drop-dead-work` against the graph before it in float64: random graphs, class-token transformers in closed form, and what must stay."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.contracts import Context, Effect
from edgekit.graph.canonicalize import canonicalize
from edgekit.graph.census import losses, whole_nodes
from edgekit.graph.cost import cost
from edgekit.graph.interpreter import run as interpret
from edgekit.graph.shapes import infer_shapes
from edgekit.passes.reparameterize.dead_work import DropDeadWork
from edgekit.source import from_module
from edgekit.trace import trace as export

_HERE = Path(__file__).parent


def _load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


random_model = _load(_HERE / "dead_work_graphs.py").random_model
timm_support = _load(_HERE.parents[1] / "timm_support.py")


def matrices(model):
    """Bytes of the weights of more than one axis."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if sum(size > 1 for size in v.shape) > 1)


def feeds(model, seed=0):
    rng = np.random.default_rng(seed)
    return {value.name: rng.normal(0.3, 1, list(value.shape)).astype(np.float32) for value in model.graph.inputs}


def assert_same(model, reference, seed=0):
    """Holds a rewritten graph against the one before: outputs in float64, valid ONNX with the shapes it says, nothing unused."""
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    values = feeds(reference, seed)
    after, before = interpret(model, values, dtype="float64"), interpret(reference, values, dtype="float64")
    assert list(after) == list(before)
    for name, array in before.items():
        assert after[name].shape == array.shape
        bound = 1e-10 * max(1.0, np.abs(array).max())
        np.testing.assert_allclose(after[name], array, rtol=0, atol=bound, err_msg=name)
    assert all(value.uses() for value in model.graph.initializers.values())


def dropped(model, context=None):
    """Runs the pass on a copy, checks all that holds for every graph, and returns the copy."""
    reference, model, context = model, model.clone(), context or Context()
    count = DropDeadWork().apply(model, context)
    assert count == len(context.rewrites)
    before, after = cost(reference), cost(model)
    assert after.macs <= before.macs
    assert matrices(model) <= matrices(reference)
    if not count:
        assert ir.to_proto(model).SerializeToString() == ir.to_proto(reference).SerializeToString()
    else:
        assert_same(model, reference)
        text = ir.to_proto(model).SerializeToString()
        again = Context()
        assert DropDeadWork().apply(model, again) == 0, again.rewrites
        assert ir.to_proto(model).SerializeToString() == text
    return model


@pytest.fixture
def graph(build, rng):
    """Returns `graph(nodes, outputs, inputs=…, shapes)`: a graph whose constants are random of the given shapes, or given as arrays."""

    def make(nodes, outputs, inputs="float[1,5,4] x", **constants):
        arrays = {
            name: rng.normal(size=value).astype(np.float32) if isinstance(value, tuple) else np.asarray(value)
            for name, value in constants.items()
        }
        return build(f"g ({inputs}) => ({outputs}) {{ {nodes} }}", arrays)

    return make


def test_declaration():
    assert (DropDeadWork.name, DropDeadWork.effect, DropDeadWork.default_order) == ("drop-dead-work", Effect.EXACT, None)


def test_random_graphs_compute_the_same():
    fired = []

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(st.integers(0, 2**32))
    def check(seed):
        model = random_model(seed)
        smaller = dropped(model)
        fired.append(cost(smaller).macs < cost(model).macs)

    check()
    assert sum(fired) > 0.25 * len(fired)


def named(model, op_type):
    return [node for node in model.graph if node.op_type == op_type]


def shapes(model):
    """Shape of the result of each node by operator, in graph order."""
    return [(node.op_type, tuple(node.outputs[0].shape)) for node in model.graph]


def traced(name, **options):
    """A network of timm of another size, with random weights and biases, as edgekit traces it."""
    timm_support._import_torchvision()
    import timm

    torch.manual_seed(0)
    module = timm.create_model(name, **options).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = canonicalize(export(from_module(module, torch.randn(1, 3, *[options["img_size"]] * 2)), "dynamo").model)
    infer_shapes(model)
    return model


def test_class_token_alone_after_the_last_attention_of_deit_tiny():
    model = traced("deit_tiny_patch16_224", img_size=224, depth=1)
    tokens, width = 197, 192
    context = Context()
    smaller = dropped(model, context)
    saved = cost(model).macs - cost(smaller).macs
    # of all rows but one: queries, projection, both layers of the MLP (4·C wide), scores and weighted sum
    assert saved == (tokens - 1) * ((1 + 1 + 8) * width**2 + 2 * tokens * width) == 87_080_448
    assert context.rewrites == [
        "blocks.0.attn.qkv/MatMul", "blocks.0.attn/Attention", "blocks.0.attn.proj/MatMul", "blocks.0.mlp.fc1/MatMul",
        "blocks.0.mlp.fc2/MatMul",
    ]  # fmt: skip
    assert losses(whole_nodes(model), whole_nodes(smaller)) == []
    assert cost(smaller).parameters == cost(model).parameters
    (attention,) = named(smaller, "Attention")
    assert [tuple(value.shape) for value in attention.inputs] == [(1, 3, 1, 64), (1, 3, tokens, 64), (1, 3, tokens, 64)]
    assert not named(smaller, "Gather")
    assert attention.name == "blocks.0.attn/Attention"


@pytest.mark.parametrize(
    ("select", "columns"),
    [
        ("y = Slice(a, two, six, last)", [2, 3, 4, 5]),
        ("y = Slice(a, six, zero, last, back)", [2, 4, 6]),
        ("y = Gather<axis=2>(a, odd)", [1, 6]),
        ("y = Gather<axis=2>(a, place)", [4]),
        ("c, y, d = Split<axis=2>(a, sizes)", [3, 4]),
    ],
)
def test_unread_channels_of_the_last_linear_layer(graph, select, columns):
    places = {
        "two": np.array([2]), "six": np.array([6]), "zero": np.array([0]), "last": np.array([-1]), "back": np.array([-2]),
        "odd": np.array([6, 1, -1]), "place": np.array(4), "sizes": np.array([3, 2, 2]),
    }  # fmt: skip
    places = {name: places[name] for name in places if name in select.replace("(", " ").replace(")", " ").replace(",", " ").split()}
    shape = {"two": "[1,5,4]", "six": "[1,5,3]", "odd": "[1,5,3]", "place": "[1,5]", "sizes": "[1,5,2]"}[next(iter(places))]
    nodes = f"h = MatMul(x, w) a = Add(h, b) {select}"
    model = graph(nodes, f"float{shape} y", w=(4, 7), b=(7,), **places)
    smaller = dropped(model)
    (product,) = named(smaller, "MatMul")
    np.testing.assert_array_equal(product.inputs[1].const_value.numpy(), model.graph.initializers["w"].const_value.numpy()[:, columns])
    assert product.inputs[1].name == "w"
    assert [node.op_type for node in smaller.graph][2:] in ([], ["Gather"], ["Slice"], ["Reshape"])


def test_slice_that_chooses_everything_disappears_and_the_output_keeps_its_name(graph):
    model = graph("h = MatMul(x, w) y = Slice(h, s, e, a)", "float[1,5,3] y", w=(4, 7), s=np.array([0]), e=np.array([3]), a=np.array([2]))
    smaller = dropped(model)
    assert shapes(smaller) == [("MatMul", (1, 5, 3))]
    assert smaller.graph.outputs[0].name == "y"
    assert list(smaller.graph.initializers) == ["w"]


def test_unread_outputs_and_rows_of_a_fused_projection(graph):
    nodes = """h = MatMul(x, w) g = Add(h, b) q, k, v = Split<axis=2, num_outputs=3>(g)
               first = Slice(q, zero, one, one) kt = Transpose<perm=[0,2,1]>(k) y = MatMul(first, kt)"""
    model = graph(nodes, "float[1,1,5] y", w=(4, 12), b=(12,), zero=np.array([0]), one=np.array([1]))
    smaller = dropped(model)
    products = [(tuple(node.inputs[0].shape), tuple(node.inputs[1].shape)) for node in named(smaller, "MatMul")]
    assert sorted(products) == [((1, 1, 4), (1, 4, 5)), ((1, 1, 4), (4, 4)), ((1, 5, 4), (4, 4))]
    assert not named(smaller, "Split")


def test_position_embedding_and_class_token_are_cut_to_the_row_that_is_read(graph):
    nodes = "e = MatMul(x, w) t = Concat<axis=1>(cls, e) p = Add(t, pos) n = LayerNormalization(p, s) y = Gather<axis=1>(n, zero)"
    model = graph(nodes, "float[1,6] y", w=(4, 6), cls=(1, 1, 6), pos=(1, 6, 6), s=(6,), zero=np.array(0))
    smaller = dropped(model)
    assert [op_type for op_type, _ in shapes(smaller)] == ["Add", "LayerNormalization", "Reshape"]
    assert tuple(smaller.graph.initializers["pos"].shape) == (1, 1, 6)


def test_branches_that_nothing_reads_go(graph):
    model = graph("h = MatMul(x, w) unused = MatMul(h, v) y = Relu(h)", "float[1,5,7] y", w=(4, 7), v=(7, 3))
    context = Context()
    assert [op_type for op_type, _ in shapes(dropped(model, context))] == ["MatMul", "Relu"]
    assert context.rewrites == ["MatMul_1"]


def test_canonical_form_has_no_unused_head_or_mask_token():
    class Pretrained(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.decoder = torch.nn.Linear(4, 4), torch.nn.Linear(4, 9)
            self.mask_token = torch.nn.Parameter(torch.ones(1, 1, 4))

        def forward(self, x):
            y = self.body(x)
            self.decoder(torch.where(x > 0, y, self.mask_token))
            return y

    model = canonicalize(export(from_module(Pretrained(), torch.randn(1, 3, 4)), "dynamo").model)
    assert sorted(model.graph.initializers) == ["body.bias", "body.weight"]
    assert DropDeadWork().apply(model, Context()) == 0


def test_groups_of_a_convolution_that_are_read(graph):
    nodes = "h = Conv<group=3, pads=[1,1]>(x, w, b) y = Slice(h, three, four, one)"
    model = graph(
        nodes, "float[1,1,5] y", "float[1,6,5] x", w=(6, 2, 3), b=(6,), three=np.array([3]), four=np.array([4]), one=np.array([1])
    )
    smaller = dropped(model)
    (conv,) = named(smaller, "Conv")
    assert conv.attributes["group"].as_int() == 1
    assert tuple(conv.inputs[1].shape) == (1, 2, 3)  # first one group of three, then one of its two channels
    assert shapes(smaller) == [("Slice", (1, 2, 5)), ("Conv", (1, 1, 5))]


HEADS = """h = MatMul(x, w) r = Reshape(h, split) q = Transpose<perm=[0,2,1,3]>(r) a = Attention<{flags}>(q, q, q{mask})
           t = Transpose<perm=[0,2,1,3]>(a) m = Reshape(t, merged) {end}"""


@pytest.mark.parametrize(("shape", "narrow"), [((5, 5), (1, 5)), ((2, 5, 5), (2, 1, 5)), ((1, 1, 1, 5), (1, 1, 1, 5))])
def test_mask_of_attention_is_cut_with_its_queries(graph, shape, narrow):
    nodes = HEADS.format(flags="is_causal=0", mask=", mask", end="y = Gather<axis=1>(m, row)")
    split, merged = np.array([1, 5, 2, 3]), np.array([1, 5, 6])
    smaller = dropped(graph(nodes, "float[1,6] y", w=(4, 6), split=split, merged=merged, row=np.array(3), mask=shape))
    (attention,) = named(smaller, "Attention")
    assert tuple(attention.inputs[0].shape) == (1, 2, 1, 3)
    assert tuple(attention.inputs[3].shape) == narrow


@pytest.mark.parametrize(("places", "columns"), [([3, 4, 5], 3), ([0, 1, 3, 4], 4), ([0, 3], 2), ([5], 1), ([0, 1, 2, 3], 6), ([0, 4], 6)])
def test_axes_that_are_split_and_merged(graph, places, columns):
    """Columns are followed into `[…, 2, 3]` where they are a product of places there; four of the six in order are none."""
    nodes = "h = MatMul(x, w) r = Reshape(h, split) e = Relu(r) m = Reshape(e, merged) y = Gather<axis=2>(m, i)"
    constants = {"split": np.array([1, 5, 2, 3]), "merged": np.array([1, 5, 6]), "i": np.array(places)}
    smaller = dropped(graph(nodes, f"float[1,5,{len(places)}] y", w=(4, 6), **constants))
    assert shapes(smaller)[0] == ("MatMul", (1, 5, columns))


def test_rows_of_causal_attention_stay_and_its_heads_do_not(graph):
    split, merged, row, zero, three, last = np.array([1, 5, 2, 3]), np.array([1, 5, 6]), np.array(3), [0], [3], [2]
    nodes = HEADS.format(flags="is_causal=1", mask="", end="y = Gather<axis=1>(m, row)")
    model = graph(nodes, "float[1,6] y", w=(4, 6), split=split, merged=merged, row=row)
    assert cost(dropped(model)).macs == cost(model).macs
    nodes = HEADS.format(flags="is_causal=1", mask="", end="y = Slice(m, zero, three, last)")
    smaller = dropped(graph(nodes, "float[1,5,3] y", w=(4, 6), split=split, merged=merged, zero=zero, three=three, last=last))
    assert shapes(smaller)[3] == ("Attention", (1, 1, 5, 3))
    assert shapes(smaller)[0] == ("MatMul", (1, 5, 3))


ROW = {"row": np.array([0])}


@pytest.mark.parametrize(
    ("nodes", "outputs", "inputs", "constants"),
    [
        # all rows are given out
        ("h = MatMul(x, w) y = Gather<axis=1>(h, row)", "float[1,1,7] y, float[1,5,7] h", "float[1,5,4] x", {"w": (4, 7), **ROW}),
        # the place is computed
        ("h = MatMul(x, w) y = Gather<axis=1>(h, i)", "float[1,1,7] y", "float[1,5,4] x, int64[1] i", {"w": (4, 7)}),
        ("h = MatMul(x, w) y = Slice(h, i, e, a)", "float[1,n,7] y", "float[1,5,4] x, int64[1] i",
         {"w": (4, 7), "e": np.array([9]), "a": np.array([1])}),
        # softmax, norms and means need all rows
        ("h = MatMul(x, w) s = Softmax<axis=1>(h) y = Gather<axis=1>(s, row)", "float[1,1,7] y", "float[1,5,4] x", {"w": (4, 7), **ROW}),
        ("h = MatMul(x, w) s = LayerNormalization<axis=1>(h, g) y = Gather<axis=1>(s, row)", "float[1,1,7] y", "float[1,5,4] x",
         {"w": (4, 7), "g": (5, 7), **ROW}),
        ("h = MatMul(x, w) y = ReduceMean(h, row)", "float[1,5,7] y", "float[1,5,4] x", {"w": (4, 7), **ROW}),
        # every row is read somewhere
        ("h = MatMul(x, w) p = Gather<axis=1>(h, even) q = Gather<axis=1>(h, odd) y = Concat<axis=1>(p, q)", "float[1,5,7] y",
         "float[1,5,4] x", {"w": (4, 7), "even": np.array([0, 2, 4]), "odd": np.array([1, 3])}),
        # there is nothing to save before the slice
        ("h = Relu(x) y = Gather<axis=1>(h, row)", "float[1,1,4] y", "float[1,5,4] x", ROW),
        # an operator that is not known to have a rule
        ("h = MatMul(x, w) v, i = TopK<axis=1>(h, two) y = Gather<axis=2>(v, row)", "float[1,2,1] y", "float[1,5,4] x",
         {"w": (4, 7), "two": np.array([2]), **ROW}),
    ],
)  # fmt: skip
def test_what_must_stay(graph, nodes, outputs, inputs, constants):
    model = graph(nodes, outputs, inputs, **constants)
    before = ir.to_proto(model).SerializeToString()
    assert DropDeadWork().apply(model, Context()) == 0
    assert ir.to_proto(model).SerializeToString() == before


def test_weight_that_others_read_is_not_cut(graph):
    nodes = "h = MatMul(x, w) y = Slice(h, zero, two, axis) z = MatMul(x, w)"
    ends = {"zero": np.array([0]), "two": np.array([2]), "axis": np.array([2])}
    model = graph(nodes, "float[1,5,2] y, float[1,5,7] z", w=(4, 7), **ends)
    context = Context()
    dropped(model, context)
    assert context.rewrites == []
    assert [(refusal.where, "read elsewhere" in refusal.why) for refusal in context.refusals] == [("MatMul_0", True)]
    rows = graph(nodes, "float[1,2,7] y, float[1,5,7] z", w=(4, 7), **{**ends, "axis": np.array([1])})
    assert shapes(dropped(rows))[1] == ("MatMul", (1, 2, 7))  # its rows need all of the weight


def test_weight_that_the_caller_may_replace_is_not_cut(graph):
    nodes = "h = MatMul(x, w) y = Slice(h, zero, two, axis)"
    ends = {"zero": np.array([0]), "two": np.array([2]), "axis": np.array([2])}
    context = Context()
    dropped(graph(nodes, "float[1,5,2] y", "float[1,5,4] x, float[4,7] w", w=(4, 7), **ends), context)
    assert context.rewrites == []
    assert "is a graph input" in context.refusals[0].why


def test_weight_is_cut_once_its_other_reader_is_gone(graph):
    nodes = "unused = MatMul(x, w) h = MatMul(x, w) y = Slice(h, zero, two, axis)"
    model = graph(nodes, "float[1,5,2] y", w=(4, 7), zero=np.array([0]), two=np.array([2]), axis=np.array([2]))
    assert shapes(dropped(model)) == [("MatMul", (1, 5, 2))]


def test_values_that_a_subgraph_reads_stay_whole(graph):
    nodes = """h = MatMul(x, w) y = Gather<axis=1>(h, row)
               z = If(c) <then_branch = g1 () => (float[1,5,7] p) { p = Relu(h) },
                          else_branch = g2 () => (float[1,5,7] q) { q = Neg(h) }>"""
    model = graph(nodes, "float[1,1,7] y, float[1,5,7] z", "float[1,5,4] x, bool c", w=(4, 7), **ROW)
    assert DropDeadWork().apply(model, Context()) == 0
    nodes = nodes.replace("y = Gather<axis=1>(h, row)", "g = MatMul(h, v) y = Gather<axis=1>(g, row)")
    model = graph(nodes, "float[1,1,3] y, float[1,5,7] z", "float[1,5,4] x, bool c", w=(4, 7), v=(7, 3), **ROW)
    reference, context = model.clone(), Context()
    assert DropDeadWork().apply(model, context) == 1
    assert context.rewrites == ["MatMul_1"]
    values = {**feeds(model), "c": np.array(True)}
    after, before = interpret(model, values), interpret(reference, values)
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, rtol=1e-6, atol=1e-6)


def test_place_that_is_skipped_computes_everything(graph):
    model = graph("h = MatMul(x, w) g = MatMul(h, v) y = Gather<axis=1>(g, row)", "float[1,1,3] y", w=(4, 7), v=(7, 3), **ROW)
    context = Context(skip=frozenset({"MatMul_0"}))
    assert DropDeadWork().apply(model, context) == 1
    assert context.rewrites == ["MatMul_1"]
    assert [shape for op_type, shape in shapes(model) if op_type == "MatMul"] == [(1, 5, 7), (1, 1, 3)]


def test_float16_weights_are_cut_bit_for_bit(graph, rng):
    weight = rng.normal(size=(4, 7)).astype(np.float16)
    model = graph("h = MatMul(x, w) y = Gather<axis=2>(h, i)", "float16[1,5,2] y", "float16[1,5,4] x", w=weight, i=np.array([5, 2]))
    assert DropDeadWork().apply(model, Context()) == 1
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), weight[:, [2, 5]])


def test_older_opsets_are_left_alone(graph):
    model = graph("h = MatMul(x, w) y = Gather<axis=1>(h, row)", "float[1,1,7] y", w=(4, 7), **ROW)
    model.opset_imports[""] = 12
    assert DropDeadWork().apply(model, Context()) == 0
