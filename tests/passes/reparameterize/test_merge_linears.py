"""`merge-linears` against the interpreter in float64 on the graph before it: adapters, changes of basis, random programs, what stops it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgekit.contracts import Context, Effect
from edgekit.graph.cost import cost
from edgekit.graph.interpreter import run
from edgekit.passes.reparameterize.merge_linears import MergeLinears


def text(nodes, inputs="float[1,3,8] x", outputs="float[1,3,8] y"):
    return f"g ({inputs}) => ({outputs}) {{ {nodes} }}"


@pytest.fixture
def arrays():
    """Constants by name: a matrix of `i` inputs and `o` outputs is `m<i>x<o>` with a letter behind it, a vector `b<c>`."""
    rng = np.random.default_rng(0)
    sizes = [(8, 8), (8, 2), (2, 8), (2, 2), (16, 8), (16, 4), (8, 16), (4, 8), (8, 4)]
    found = {f"m{i}x{o}{letter}": rng.normal(size=(i, o)) for i, o in sizes for letter in "abc"}
    found |= {f"b{size}": rng.normal(size=size) for size in (2, 4, 8, 16)}
    found = {name: array.astype(np.float32) for name, array in found.items()}
    numbers = {"zero": 0, "four": 4, "eight": 8, "last": -1}
    return found | {"half": np.float32(0.5)} | {name: np.array([number]) for name, number in numbers.items()}


@pytest.fixture
def used(arrays):
    """Returns the arrays whose names occur in a graph's text, those of `changed` instead where they are given."""

    def choose(graph, **changed):
        declared = graph.split("=>")[0]
        return {
            n: a for n, a in (arrays | changed).items() if f"{n}" in graph.replace(",", " ").replace(")", " ").split() and n not in declared
        }

    return choose


def feeds_of(model, seed=1):
    rng = np.random.default_rng(seed)
    return {v.name: rng.normal(0.3, 1, list(v.shape)).astype(v.dtype.numpy()) for v in model.graph.inputs}


def assert_same(model, references, feeds, relative=1e-5):
    results = run(model, feeds, dtype="float64")
    for name, reference in references.items():
        assert np.abs(results[name] - reference).max() <= relative * max(np.abs(reference).max(), 1e-3), name


def matrices(model):
    """Elements of all matrices that products read."""
    weights = {node.inputs[1] for node in model.graph if node.op_type == "MatMul"}
    return sum(weight.const_value.size for weight in weights if weight.is_initializer())


@pytest.fixture
def merged(build, used, operators):
    """Returns a check that a graph becomes one of the given operators and MACs, computes the same, and is left alone the second time."""

    def check(graph, expected, macs, rewrites=1):
        model = build(graph, used(graph))
        feeds = feeds_of(model)
        references = run(model, feeds, dtype="float64")
        names = [value.name for value in model.graph.outputs]
        context = Context()
        assert MergeLinears().apply(model, context) == rewrites == len(context.rewrites), context.refusals
        assert operators(model) == expected
        assert cost(model).macs == macs
        assert [value.name for value in model.graph.outputs] == names
        assert_same(model, references, feeds)
        assert all(value.uses() for value in model.graph.initializers.values())
        after = ir.to_proto(model).SerializeToString()
        assert MergeLinears().apply(model, Context()) == 0
        assert ir.to_proto(model).SerializeToString() == after
        return model

    return check


@pytest.fixture
def refused(build, used):
    """Returns a check that the pass leaves a graph as it is and says why."""

    def check(graph, why, **changed):
        model = build(graph, used(graph, **changed))
        before, context = ir.to_proto(model).SerializeToString(), Context()
        assert MergeLinears().apply(model, context) == 0
        assert ir.to_proto(model).SerializeToString() == before
        assert any(why in refusal.why for refusal in context.refusals) if why else context.refusals == [], context.refusals

    return check


def test_declaration():
    assert (MergeLinears.name, MergeLinears.effect, MergeLinears.default_order) == ("merge-linears", Effect.EXACT, None)


def test_low_rank_adapter(merged):
    nodes = "w = MatMul(x, m8x8a ) a = MatMul(x, m8x2a ) h = Mul(a, half ) u = MatMul(h, m2x8a ) s = Add(w, u) y = Add(s, b8 )"
    model = merged(text(nodes), {"MatMul": 1, "Add": 1}, 3 * 64)
    assert [value.name for value in model.graph[0].inputs] == ["x", "m8x8a"]  # a user knows the weight by its module's name


def test_adapter_beside_a_residual_stays_in_the_sum(merged):
    nodes = "w = MatMul(x, m8x8a ) a = MatMul(x, m8x2a ) u = MatMul(a, m2x8a ) r = Add(z, w) y = Add(r, u)"
    merged(text(nodes, "float[1,3,8] x, float[1,3,8] z"), {"MatMul": 1, "Add": 1}, 3 * 64)


def test_scaled_residual_is_not_taken_for_the_residual(merged):
    nodes = "r = Mul(z, half ) a = MatMul(x, m8x8a ) b = MatMul(a, m8x8b ) y = Add(r, b)"
    merged(text(nodes, "float[1,3,8] x, float[1,3,8] z"), {"Mul": 1, "MatMul": 1, "Add": 1}, 3 * 64)
    merged(text(nodes.replace("r = Mul(z, half )", "r = Add(z, b8 )"), "float[1,3,8] x, float[1,3,8] z"), {"MatMul": 1, "Add": 2}, 3 * 64)


def test_product_after_product(merged):
    merged(text("a = MatMul(x, m8x8a ) b = Add(a, b8 ) c = MatMul(b, m8x8b ) y = Add(c, b8 )"), {"MatMul": 1, "Add": 1}, 3 * 64)
    merged(text("a = MatMul(x, m8x16a ) b = Add(a, b16 ) y = MatMul(b, m16x8a )"), {"MatMul": 1, "Add": 1}, 3 * 64)


def test_third_factor_joins_the_cheaper_side_of_a_low_rank_pair(merged):
    merged(text("a = MatMul(x, m8x2a ) b = MatMul(a, m2x8a ) y = MatMul(b, m8x8a )"), {"MatMul": 2}, 3 * 32)
    merged(text("a = MatMul(x, m8x8a ) b = MatMul(a, m8x2a ) c = MatMul(b, m2x2a ) y = MatMul(c, m2x8a )"), {"MatMul": 2}, 3 * 32)


def test_averaged_heads(merged):
    nodes = "a = MatMul(x, m8x8a ) b = Add(a, b8 ) c = MatMul(x, m8x8b ) d = Add(c, b8 ) s = Add(b, d) y = Mul(s, half )"
    merged(text(nodes), {"MatMul": 1, "Add": 1}, 3 * 64)


def test_residual_of_a_linear(merged):
    merged(text("a = MatMul(x, m8x8a ) y = Add(x, a)"), {"MatMul": 1}, 3 * 64)
    merged(text("a = MatMul(x, m8x8a ) b = Add(a, b8 ) y = Sub(b, x)"), {"MatMul": 1, "Add": 1}, 3 * 64)


def test_only_the_columns_that_are_read_remain(merged):
    nodes = "a = MatMul(x, m8x16a ) b = Add(a, b16 ) y = Slice(b, four , eight , last )"
    merged(text(nodes, outputs="float[1,3,4] y"), {"MatMul": 1, "Add": 1}, 3 * 32)


def test_basis_change_of_a_part_is_merged_across_concat(merged):
    nodes = "p = MatMul(x, m8x8a ) c = Concat<axis=-1>(z, p) q = MatMul(c, m16x8a ) y = Identity(q)"
    merged(text(nodes, "float[1,3,8] x, float[1,3,8] z").replace("Identity", "Relu"), {"Concat": 1, "MatMul": 1, "Relu": 1}, 3 * 128)


def test_products_of_one_value_side_by_side(merged):
    nodes = "a = MatMul(x, m8x4a ) b = MatMul(x, m8x4b ) c = Add(b, b4 ) y = Concat<axis=2>(a, c)"
    merged(text(nodes), {"MatMul": 1, "Add": 1}, 3 * 64)


def test_product_that_several_products_read_goes_into_each(merged):
    nodes = "a = MatMul(x, m8x8a ) s = Add(a, b8 ) q = MatMul(s, m8x8b ) y = Add(q, b8 ) z = MatMul(s, m8x8c )"
    merged(text(nodes, outputs="float[1,3,8] y, float[1,3,8] z"), {"MatMul": 2, "Add": 2}, 3 * 128)


def test_batch_norm_between_linears(build, used, operators):
    nodes = "a = MatMul(x, m8x8a ) n = BatchNormalization(a, b8 , b8 , b8 , v ) y = MatMul(n, m8x8b )"
    graph = text(nodes, "float[3,8] x", "float[3,8] y")
    model = build(graph, used(graph, v=np.linspace(0.1, 1, 8, dtype=np.float32)))
    feeds = feeds_of(model)
    references = run(model, feeds, dtype="float64")
    assert MergeLinears().apply(model, Context()) == 1
    assert operators(model) == {"MatMul": 1, "Add": 1}
    assert_same(model, references, feeds)


def test_low_rank_pair_is_refused_by_cost(refused):
    refused(text("a = MatMul(x, m8x2a ) y = MatMul(a, m2x8a )"), "as one they would take 192 multiply-accumulates and 64 elements")


def test_block_diagonal_is_refused_by_cost(refused):
    nodes = "a = MatMul(x, m8x4a ) b = MatMul(z, m8x4b ) y = Concat<axis=-1>(a, b)"
    refused(text(nodes, "float[1,3,8] x, float[1,3,8] z"), "2 products are not merged")


def test_sum_of_products_of_two_values_is_refused(refused):
    refused(text("a = MatMul(x, m8x8a ) b = MatMul(z, m8x8b ) y = Add(a, b)", "float[1,3,8] x, float[1,3,8] z"), "2 products")


def test_averaged_heads_of_two_tokens_become_one(merged, refused):
    nodes = "a = MatMul(x, m2x8a ) b = Add(a, b8 ) c = MatMul(z, m2x8b ) d = Add(c, b8 ) s = Add(b, d) y = Mul(s, half )"
    merged(text(nodes, "float[1,3,2] x, float[1,3,2] z"), {"Concat": 1, "MatMul": 1, "Add": 1}, 3 * 32)
    refused(text(nodes.replace("2x8", "8x8"), "float[1,3,8] x, float[1,3,8] z"), "2 products")  # the copies would cost as much


def test_low_rank_branch_with_an_activation_stays_beside_its_layer(refused):
    nodes = "a = MatMul(x, m8x8a ) b = Add(a, b8 ) c = MatMul(x, m8x2a ) r = Relu(c) u = MatMul(r, m2x8a ) y = Add(b, u)"
    refused(text(nodes), "2 products are not merged")


def test_value_read_elsewhere_is_refused(refused):
    nodes = "a = MatMul(x, m8x8a ) y = MatMul(a, m8x8b )"
    refused(text(nodes, outputs="float[1,3,8] y, float[1,3,8] a"), "its result is read elsewhere")
    refused(text(nodes + " z = Relu(a)", outputs="float[1,3,8] y, float[1,3,8] z"), "its result is read elsewhere")


def test_weights_that_are_not_constant_are_refused(refused):
    nodes = "a = MatMul(x, m8x8a ) y = MatMul(a, m8x8b )"
    refused(text(nodes, "float[1,3,8] x, float[8,8] m8x8a"), "the weight of MatMul 'MatMul_0' is not a constant")
    refused(text(nodes, "float[1,3,8] x, float[8,8] m8x8b"), "the weight of MatMul 'MatMul_1' is not a constant")
    computed = "u = Relu( m8x8b ) a = MatMul(x, m8x8a ) y = MatMul(a, u)"
    refused(text(computed), "the weight of MatMul 'MatMul_2' is not a constant")
    refused(text("a = MatMul(x, m8x8a ) b = Add(a, b8 ) y = MatMul(b, m8x8b )", "float[1,3,8] x, float[8] b8"), "")


def test_shared_matrix_that_would_be_stored_twice_is_refused(refused):
    """The factor is read by another product as well: it would stay, and the merged matrix come on top."""
    nodes = "a = MatMul(x, m8x8a ) y = MatMul(a, m8x8b ) r = Relu(x) s = MatMul(r, m8x8a ) z = MatMul(s, m8x8b )"
    refused(
        text(nodes.replace("z = MatMul(s", "t = Relu(s) z = MatMul(t"), outputs="float[1,3,8] y, float[1,3,8] z"),
        "2 products are not merged",
    )


def test_shared_matrix_is_not_changed_for_others(build, used, arrays):
    graph = text("a = MatMul(x, m8x8a ) y = MatMul(a, m8x8b ) r = Relu(x) z = MatMul(r, m8x8a )", outputs="float[1,3,8] y, float[1,3,8] z")
    model = build(graph, used(graph))
    feeds = feeds_of(model)
    references = run(model, feeds, dtype="float64")
    assert MergeLinears().apply(model, Context()) == 1
    np.testing.assert_array_equal(model.graph.initializers["m8x8a"].const_value.numpy(), arrays["m8x8a"])
    assert_same(model, references, feeds)


def test_activation_and_other_axes_end_a_form(refused):
    refused(text("a = MatMul(x, m8x8a ) r = Relu(a) y = MatMul(r, m8x8b )"), "")
    nodes = "a = MatMul(x, m8x8a ) s = Slice(a, zero , four , one ) y = MatMul(s, m8x8b )"
    refused(text(nodes), "", one=np.array([1]))
    refused(text("a = MatMul(x, m8x8a ) s = Add(a, pos ) y = MatMul(s, m8x8b )"), "", pos=np.ones((1, 3, 8), np.float32))
    nodes = "a = MatMul(x, m8x8a ) c = Concat<axis=1>(a, x) y = MatMul(c, m8x8b )"
    refused(text(nodes, outputs="float[1,6,8] y"), "")


def test_zero_bias_is_no_reason(refused):
    nodes = "a = MatMul(x, m8x8a ) b = Add(a, b8 ) y = Add(z, b)"
    refused(text(nodes, "float[1,3,8] x, float[1,3,8] z"), "", b8=np.zeros(8, np.float32))


def test_scalings_alone_are_left_to_other_passes(refused):
    refused(text("s = Mul(x, b8 ) a = MatMul(s, m8x8a ) b = Add(a, b8 ) y = Mul(b, half )"), "")


def test_matrix_that_is_not_finite_is_refused(refused):
    big = np.full((8, 8), 300, np.float16)
    graph = text("a = MatMul(x, m8x8a ) y = MatMul(a, m8x8b )", "float16[1,3,8] x", "float16[1,3,8] y")
    refused(graph, "would not be finite in float16", m8x8a=big, m8x8b=big)


def test_skipped_place_is_left_alone(build, used):
    graph = text("a = MatMul(x, m8x8a ) y = MatMul(a, m8x8b )")
    model, context = build(graph, used(graph)), Context()
    MergeLinears().apply(model, context)
    again = build(graph, used(graph))
    assert MergeLinears().apply(again, Context(skip=frozenset(context.rewrites))) == 0


def test_traced_adapter(trace, operators):
    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.down, self.up = nn.Linear(8, 8), nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

        def forward(self, x):
            return torch.relu(self.main(x) + 0.5 * self.up(self.down(x)))

    for shape in ((3, 8), (1, 3, 8)):
        module = Adapter()
        model = trace(module, shape)
        assert MergeLinears().apply(model, Context()) == 1
        assert operators(model) == {"MatMul": 1, "Add": 1, "Relu": 1}
        x = torch.randn(shape)
        expected = module(x).detach().numpy()
        (result,) = run(model, {model.graph.inputs[0].name: x.numpy()}).values()
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)


KINDS = ("product", "bias", "scale", "sum", "concat", "slice", "split", "gather", "relu")


class Program:
    """A random graph of linear maps of the last axis, with an activation here and there: `kinds` in turn, the rest from a seed."""

    def __init__(self, kinds, seed):
        self.rng = np.random.default_rng(seed)
        self.lines, self.arrays = [], {}
        self.leading = self.one_of("3", "1,2", "2,1,2")
        self.last = self.leading.count(",") + 1
        self.width = {name: self.number(1, 6) for name in "xz"}
        for kind in ("product", *kinds):
            getattr(self, kind)()

    def number(self, low, high):
        return int(self.rng.integers(low, high + 1))

    def one_of(self, *things):
        return things[self.number(0, len(things) - 1)]

    def constant(self, array):
        name = f"k{len(self.arrays)}"
        self.arrays[name] = np.asarray(array)
        return name

    def floats(self, *shape):
        return self.constant(self.rng.normal(size=shape).astype(np.float32))

    def add(self, call, width):
        self.lines.append(f"v{len(self.lines)} = {call}")
        self.width[f"v{len(self.lines) - 1}"] = width

    def pick(self, width=None):
        names = [name for name, size in self.width.items() if width in (None, size)]
        return names[-1] if self.rng.random() < 0.6 else self.one_of(*names)

    def product(self):
        x, out = self.pick(), self.number(1, 6)
        self.add(f"MatMul({x}, {self.floats(self.width[x], out)})", out)

    def bias(self):
        x = self.pick()
        shape = self.one_of((self.width[x],), (1, self.width[x]), (1,), ())
        pair = (x, self.floats(*shape))
        self.add(f"{self.one_of('Add', 'Sub')}({', '.join(self.one_of(pair, pair[::-1]))})", self.width[x])

    def scale(self):
        x = self.pick()
        factor = self.rng.uniform(0.5, 2, self.one_of((self.width[x],), (1, 1), ())).astype(np.float32)
        self.add(f"{self.one_of('Mul', 'Div')}({x}, {self.constant(factor)})", self.width[x])

    def sum(self):
        x = self.pick()
        self.add(f"{self.one_of('Add', 'Sub', 'Sum')}({x}, {self.pick(self.width[x])})", self.width[x])

    def concat(self):
        x, y = self.pick(), self.pick()
        self.add(f"Concat<axis={self.one_of(-1, self.last)}>({x}, {y})", self.width[x] + self.width[y])

    def slice(self):
        x = self.pick()
        start, step = self.number(0, self.width[x] - 1), self.number(1, 2)
        end = self.number(start + 1, self.width[x])
        limits = [self.constant(np.array([number])) for number in (start, end, self.one_of(-1, self.last), step)]
        self.add(f"Slice({x}, {', '.join(limits)})", -(-(end - start) // step))

    def split(self):
        """Splits in two and joins the parts in the other order, half of the time after a scaling of one."""
        x = self.pick()
        if self.width[x] == 1:
            return
        first = self.number(1, self.width[x] - 1)
        place, rest = len(self.lines), self.width[x] - first
        parts = self.constant(np.array([first, rest]))
        self.lines.append(f"p{place}, q{place} = Split<axis={self.one_of(-1, self.last)}>({x}, {parts})")
        self.add(f"Mul(p{place}, {self.floats(first)})", first)
        self.add(f"Concat<axis=-1>(q{place}, v{place + 1})", self.width[x])

    def gather(self):
        x = self.pick()
        places = self.rng.integers(0, self.width[x], self.number(1, 4))
        self.add(f"Gather<axis={self.one_of(-1, self.last)}>({x}, {self.constant(places)})", len(places))

    def relu(self):
        x = self.pick()
        self.add(f"Relu({x})", self.width[x])

    def graph(self):
        last = [name for name in self.width if name not in "xz"][-self.one_of(1, 1, 2) :]
        inputs = ", ".join(f"float[{self.leading},{self.width[name]}] {name}" for name in "xz")
        outputs = ", ".join(f"float[{self.leading},{self.width[name]}] {name}" for name in last)
        return f"g ({inputs}) => ({outputs}) {{ {' '.join(self.lines)} }}"


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(KINDS), min_size=2, max_size=9), st.integers(0, 2**32 - 1))
def test_random_programs(build, kinds, seed):
    program = Program(kinds, seed)
    model = build(program.graph(), program.arrays)
    feeds = feeds_of(model)
    references = run(model, feeds, dtype="float64")
    before, elements = cost(model), matrices(model)
    context = Context()
    count = MergeLinears().apply(model, context)
    assert count == len(context.rewrites)
    assert cost(model).macs <= before.macs
    assert matrices(model) <= elements
    assert_same(model, references, feeds)
    proto = ir.to_proto(model).SerializeToString()
    assert MergeLinears().apply(model, Context()) == 0
    assert ir.to_proto(model).SerializeToString() == proto
