"""`mask-aware` against the published algorithm, written out in PyTorch, and the exact properties that a masked network has."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from edgekit.contracts import Context, Effect
from edgekit.errors import UsageError
from edgekit.graph.canonicalize import canonicalize
from edgekit.graph.check import check_model
from edgekit.graph.cost import cost
from edgekit.graph.interpreter import Interpreter, run
from edgekit.passes.masking.mask_aware import MaskAware
from edgekit.passes.reparameterize.fold_batch_norm import FoldBatchNorm


class Plain:
    """The layers as they are."""

    def conv(self, x, layer):
        return layer(x)

    norm = act = pool = conv

    def mean(self, x):
        return x.mean((2, 3), keepdim=True)

    def add(self, a, b):
        return a + b

    def cat(self, *maps):
        return torch.cat(maps, 1)

    def scale(self, x, factor):
        return x * factor


def fill(x, m, rounds):
    """Section 3 of the paper: unknown places become the mean of their known neighbours, one ring a round."""
    x = x * m
    for _ in range(rounds):
        ones = torch.ones(x.shape[1], 1, 3, 3, dtype=x.dtype)
        total = functional.conv2d(x, ones, padding=1, groups=x.shape[1])
        known = functional.conv2d(m, ones[:1], padding=1)
        x = x + (1 - m) * total / (known + 1e-5)
        m = torch.clamp(m + known, max=1)
    return x


class Masked:
    """The layers of the published algorithm on pairs (x, m)."""

    def __init__(self, extra=1, fills=True, union=False):
        self.extra, self.fills, self.union = extra, fills, union  # the authors fill k times: one more than the kernel reaches

    def conv(self, pair, layer):
        x, m = pair
        reach = max((k - 1) * d for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
        y = layer(fill(x, m, (reach + self.extra) if self.fills else 0))
        ones = torch.ones(1, 1, *layer.kernel_size, dtype=x.dtype)
        m = (functional.conv2d(m, ones, None, layer.stride, layer.padding, layer.dilation) > 0).to(x.dtype)
        return y * m, m

    def norm(self, pair, layer):
        x, m = pair
        return layer(x * m) * m, m

    act = norm

    def pool(self, pair, layer):
        x, m = pair
        known = (layer(m) > 0).to(x.dtype)
        return layer(x) * known, known

    def mean(self, pair):
        x, m = pair
        return (x * m).mean((2, 3), keepdim=True) / (m.mean((2, 3), keepdim=True) + 1e-8)

    def add(self, a, b):
        m = a[1] * b[1]
        return (a[0] + b[0]) * m, m

    def cat(self, *maps):
        masks = torch.cat([m for _, m in maps], 1)
        m = masks.amax(1, keepdim=True) if self.union else (masks.sum(1, keepdim=True) > 0.5 * len(maps)).to(masks.dtype)
        return torch.cat([x for x, _ in maps], 1) * m, m

    def scale(self, pair, factor):
        return pair[0] * factor, pair[1]


class Residual(nn.Module):
    """A small ResNet: 7×7 stem, max pooling, blocks with and without a projection."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.pool = nn.Conv2d(3, 6, 7, 2, 3, bias=False), nn.BatchNorm2d(6), nn.MaxPool2d(3, 2, 1)
        self.a, self.na, self.b, self.nb = (
            nn.Conv2d(6, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.BatchNorm2d(6),
        )
        self.c, self.d, self.skip = nn.Conv2d(6, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(6, 8, 1, 2)
        self.relu, self.head = nn.ReLU(), nn.Linear(8, 5)

    def forward(self, x, ops=None):
        ops = ops or Plain()
        x = ops.pool(ops.act(ops.norm(ops.conv(x, self.stem), self.norm), self.relu), self.pool)
        y = ops.act(ops.norm(ops.conv(x, self.a), self.na), self.relu)
        x = ops.act(ops.add(ops.norm(ops.conv(y, self.b), self.nb), x), self.relu)
        y = ops.conv(ops.act(ops.conv(x, self.c), self.relu), self.d)
        x = ops.act(ops.add(ops.conv(x, self.skip), y), self.relu)
        return self.head(ops.mean(x).flatten(1))


class Mobile(nn.Module):
    """Depthwise 5×5, squeeze and excitation, hard swish, SiLU, sigmoid gates, GELU, an unequal and a dilated kernel."""

    def __init__(self):
        super().__init__()
        self.stem, self.dw = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 5, padding=2, groups=6)
        self.down, self.up, self.out = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 1, bias=False)
        self.wide, self.dilated = nn.Conv2d(6, 4, (1, 5), padding=(0, 2)), nn.Conv2d(4, 4, 3, padding=3, dilation=3)
        self.head = nn.Linear(4, 5)

    def forward(self, x, ops=None):
        ops = ops or Plain()
        x = ops.act(ops.conv(x, self.stem), nn.Hardswish())
        y = ops.act(ops.conv(x, self.dw), nn.SiLU())
        scale = torch.sigmoid(self.up(torch.relu(self.down(ops.mean(y)))))
        x = ops.add(x, ops.conv(ops.scale(y, scale), self.out))
        x = ops.act(ops.conv(ops.act(x, nn.ReLU6()), self.wide), nn.Sigmoid())
        x = ops.act(ops.conv(x, self.dilated), nn.GELU())
        return self.head(ops.mean(x).flatten(1))


class Dense(nn.Module):
    """Concatenations of maps with different masks, and average pooling."""

    def __init__(self):
        super().__init__()
        self.squeeze, self.small, self.large = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 3, padding=1)
        self.next, self.pool, self.head = nn.Conv2d(6, 4, 3, padding=1), nn.AvgPool2d(2, 2), nn.Linear(10, 5)

    def forward(self, x, ops=None):
        ops = ops or Plain()
        x = ops.act(ops.conv(x, self.squeeze), nn.ReLU())
        x = ops.pool(ops.act(ops.cat(ops.conv(x, self.small), ops.conv(x, self.large)), nn.ELU()), self.pool)
        return self.head(ops.mean(ops.cat(x, ops.conv(x, self.next))).flatten(1))


NETWORKS = {"residual": Residual, "mobile": Mobile, "dense": Dense}
SIZE = (2, 3, 22, 26)


@pytest.fixture(scope="module")
def networks(trace):
    """Per name the module with random statistics and its canonical graph."""
    found = {}
    for name, make in NETWORKS.items():
        torch.manual_seed(1)
        module = make()
        found[name] = module, trace(module, SIZE)
    return found


@pytest.fixture(params=list(NETWORKS))
def network(request, networks):
    module, model = networks[request.param]
    return module, model.clone()


def image(seed=0):
    return np.random.default_rng(seed).normal(0.3, 1, SIZE).astype(np.float32)


def keep(seed=0, kind="patches"):
    """A mask of patches, of scattered points, or of one corner, `[B, 1, H, W]`."""
    rng = np.random.default_rng(seed)
    if kind == "patches":
        coarse = rng.integers(0, 2, (SIZE[0], 1, 4, 4))
        return np.kron(coarse, np.ones((1, 1, 6, 7)))[..., : SIZE[2], : SIZE[3]].astype(np.float32)
    mask = np.zeros((SIZE[0], 1, *SIZE[2:]), np.float32)
    if kind == "points":
        mask.reshape(SIZE[0], -1)[:, rng.integers(0, SIZE[2] * SIZE[3], 6)] = 1
    else:
        mask[..., :5, :6] = 1
    return mask


def masked(model, **options):
    context = Context()
    assert MaskAware(**options).apply(model, context) > 0, context.refusals
    check_model(model, "masked")
    return model


def outputs(model, x, mask=None, dtype="float32"):
    feeds = {model.graph.inputs[0].name: x} | ({} if mask is None else {"mask": mask})
    (result,) = run(model, feeds, dtype=dtype).values()
    return result


def reference(module, x, mask, **options):
    with torch.no_grad():
        wide = type(module)()
        wide.load_state_dict(module.state_dict())
        return (
            wide.double()
            .eval()((torch.from_numpy(x).double() * torch.from_numpy(mask), torch.from_numpy(mask).double()), Masked(**options))
            .numpy()
        )


def test_declaration():
    assert (MaskAware.name, MaskAware.effect, MaskAware.default_order) == ("mask-aware", Effect.EXACT, None)


@pytest.mark.parametrize("kind", ["patches", "points", "corner"])
def test_equals_the_published_algorithm(network, kind):
    module, model = network
    x, mask = image(), keep(kind=kind)
    expected = reference(module, x, mask)
    assert np.abs(expected[0] - expected[1]).max() > 1e-4
    result = outputs(masked(model), x, mask, dtype="float64")
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_options_equal_the_published_ones(networks):
    x, mask = image(), keep(kind="points")
    module, model = networks["dense"]
    expected = reference(module, x, mask, union=True)
    np.testing.assert_allclose(outputs(masked(model.clone(), concat="union"), x, mask, "float64"), expected, rtol=0, atol=1e-5)
    expected = reference(module, x, mask, fills=False)
    np.testing.assert_allclose(outputs(masked(model.clone(), rounds=0), x, mask, "float64"), expected, rtol=0, atol=1e-5)
    assert np.abs(reference(module, x, mask) - expected).max() > 1e-3


def test_mask_of_ones_changes_nothing(network, run):
    _, model = network
    x = image()
    expected = run(model, {model.graph.inputs[0].name: x})[0]
    result = masked(model)
    for feeds in ({}, {"mask": np.ones((SIZE[0], 1, *SIZE[2:]), np.float32)}):
        np.testing.assert_allclose(run(result, {result.graph.inputs[0].name: x} | feeds)[0], expected, rtol=0, atol=1e-6)


def test_nothing_depends_on_what_is_under_the_mask(network, run):
    _, model = network
    masked(model)
    mask = keep(2)
    first, second = image(1), np.where(mask > 0, image(1), 1e3 * image(2))
    a, b = (run(model, {model.graph.inputs[0].name: x, "mask": mask})[0] for x in (first, second))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - run(model, {model.graph.inputs[0].name: image(3), "mask": mask})[0]).max() > 1e-3


def test_nothing_known_gives_the_head_of_zero(network, run):
    module, model = network
    masked(model)
    mask = np.zeros((SIZE[0], 1, *SIZE[2:]), np.float32)
    results = [run(model, {model.graph.inputs[0].name: image(seed), "mask": mask})[0] for seed in (0, 1)]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_allclose(results[0], np.broadcast_to(module.head.bias.detach().numpy(), results[0].shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_one_round_less_than_the_kernel_is_enough_bit_for_bit(build, run, kernel, stride):
    pad, rng = kernel // 2, np.random.default_rng(0)
    out = [-(-n // stride) for n in (13, 12)]
    text = f"""g (float[1,2,13,12] x) => (float[1,3,{out[0]},{out[1]}] y) {{
        y = Conv<pads=[{pad},{pad},{pad},{pad}], strides=[{stride},{stride}]>(x, w) }}"""
    weight = rng.normal(size=(3, 2, kernel, kernel)).astype(np.float32)
    mask = (rng.random((1, 1, 13, 12)) < 0.06).astype(np.float32)
    feeds = {"x": rng.normal(size=(1, 2, 13, 12)).astype(np.float32), "mask": mask}
    default, published, fewer = (run(masked(build(text, {"w": weight}), rounds=rounds), feeds)[0] for rounds in (None, kernel, kernel // 2))
    np.testing.assert_array_equal(default, published)
    assert np.abs(default - fewer).max() > 1e-3


def test_folded_batch_norms_give_the_same(networks):
    _, model = networks["residual"]
    x, mask = image(), keep(4)
    expected = outputs(masked(model.clone()), x, mask, "float64")
    folded = model.clone()
    assert FoldBatchNorm().apply(folded, Context()) == 3
    np.testing.assert_allclose(outputs(masked(folded), x, mask, "float64"), expected, rtol=0, atol=1e-6)
    assert len(folded.graph) < len(masked(model.clone()).graph)


def test_values_of_the_mask_count_as_known_or_unknown(networks):
    _, model = networks["residual"]
    x, mask = image(), keep(5)
    masked(model := model.clone())
    np.testing.assert_array_equal(outputs(model, x, mask), outputs(model, x, 0.25 * mask - (1 - mask)))


def test_second_time_is_refused(networks):
    model, context = masked(networks["dense"][1].clone()), Context()
    before = ir.to_proto(model).SerializeToString()
    assert MaskAware().apply(model, context) == 0
    assert "has a mask already" in context.refusals[0].why
    assert ir.to_proto(model).SerializeToString() == before


def test_cost_is_that_of_the_network(network):
    _, model = network
    before = cost(model).macs
    assert cost(masked(model)).macs == before


def test_half_precision(build, run):
    text = "g (float16[1,2,6,6] x) => (float16[1,3,1,1] y) { a = Conv<pads=[1,1,1,1]>(x, w, b) y = GlobalAveragePool(a) }"
    rng = np.random.default_rng(0)
    arrays = {"w": rng.normal(size=(3, 2, 3, 3)).astype(np.float16), "b": rng.normal(size=3).astype(np.float16)}
    model, plain = masked(build(text, arrays)), build(text, arrays)
    x = rng.normal(size=(1, 2, 6, 6)).astype(np.float16)
    np.testing.assert_allclose(run(model, {"x": x})[0], run(plain, {"x": x})[0], rtol=0, atol=2e-3)
    nothing = run(model, {"x": x, "mask": np.zeros((1, 1, 6, 6), np.float16)})[0]
    np.testing.assert_array_equal(nothing, np.zeros((1, 3, 1, 1), np.float16))


IMAGE, MAP = "float[1,4,6,6] x", "float[1,4,6,6] y"
REFUSED = {
    "y = LayerNormalization(x, s)": "layer masking has no rule for LayerNormalization",
    "a = Relu(x) y = Transpose<perm=[0,1,3,2]>(a)": "layer masking has no rule for Transpose",
    "a = Conv(x, w) y = Softmax<axis=1>(a)": "layer masking has no rule for Softmax",
    "n, rm, rv = BatchNormalization<training_mode=1>(x, c, c, c, c) y = Relu(n)": "in training mode",
    "y = Div(one, x)": "divides by a map",
    "y = Concat<axis=2>(x, x)": "along another axis than the channels",
    "y = Concat<axis=1>(x, big)": "Concat of maps with something that has no mask",
    "y = Pad(x, pads, one)": "pads with other values than zero",
    "y = Pad(x, around)": "pads other axes",
    "y = ReduceMean(x, channel)": "averages over other axes",
    "u = Relu(w) y = Conv(x, u)": "the weight is not a constant",
    "y = Conv(big, x)": "an operand other than the first of Conv",
}


@pytest.mark.parametrize("nodes", REFUSED)
def test_layer_without_a_rule_leaves_the_network_as_it_is(build, nodes):
    rng = np.random.default_rng(0)
    arrays = {
        "s": np.ones(6, np.float32),
        "c": np.ones(4, np.float32),
        "w": rng.normal(size=(4, 4, 1, 1)).astype(np.float32),
        "one": np.float32(1),
        "big": np.ones((1, 4, 6, 6), np.float32),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "around": np.array([0, 1, 1, 1, 0, 0, 1, 1]),
        "channel": np.array([1]),
    }
    words = nodes.replace(",", " ").replace("(", " ").replace(")", " ").split()
    model = build(
        f"g ({IMAGE}) => (float[1,'C','H','W'] y) {{ {nodes} }}".replace("'C','H','W'", "N,M,K"),
        {n: a for n, a in arrays.items() if n in words},
    )
    before, context = ir.to_proto(model).SerializeToString(), Context()
    assert MaskAware().apply(model, context) == 0
    assert ir.to_proto(model).SerializeToString() == before
    assert any(REFUSED[nodes] in refusal.why for refusal in context.refusals), context.refusals


def test_which_input_is_the_image(build):
    text = "g (float[1,4,6,6] a, float[1,4,6,6] b) => (float[1,4,6,6] y) { c = Relu(b) y = Add(a, c) }"
    context = Context()
    assert MaskAware().apply(build(text), context) == 0
    assert "several inputs are images: a, b" in context.refusals[0].why
    model = masked(build(text), image="b", mask="keep")
    assert [value.name for value in model.graph.inputs] == ["a", "b", "keep"]
    with pytest.raises(UsageError, match="no input 'c'"):
        MaskAware(image="c").apply(build(text), Context())
    context = Context()
    assert MaskAware().apply(build("g (float[3,4] a) => (float[3,4] y) { y = Relu(a) }"), context) == 0
    assert "no input is an image" in context.refusals[0].why


@pytest.mark.parametrize(
    ("options", "what"), [({"rounds": -1}, "-1 rounds"), ({"epsilon": 0.0}, "epsilon of 0"), ({"concat": "all"}, "rule 'all'")]
)
def test_bad_options_are_named(options, what):
    with pytest.raises(UsageError, match=what):
        MaskAware(**options)


def test_place_to_skip_stops_the_whole(networks):
    model = networks["dense"][1].clone()
    name, context = model.graph[0].name, Context()
    assert MaskAware().apply(model, Context(skip=frozenset({name}), refusals=context.refusals)) == 0
    assert "left alone" in context.refusals[0].why


def random_text(rng):
    """A chain of layers with random geometry, with one sum of two maps in it."""
    lines, arrays, height, width, channels = [], {}, int(rng.integers(6, 10)), int(rng.integers(6, 10)), 2
    shape = f"float[1,2,{height},{width}] x"
    current = "x"
    for index in range(int(rng.integers(1, 4))):
        kind = rng.choice(["conv", "conv", "conv", "max", "average", "norm", "act", "branch"])
        kh, kw = (int(k) for k in rng.integers(1, 5, 2))
        dh, dw = (int(d) for d in rng.integers(1, 3, 2))
        sh, sw = (int(s) for s in rng.integers(1, 3, 2))
        pads = [int(rng.integers(0, max(1, k))) for k in (kh, kw, kh, kw)]
        new = f"v{index}"
        if kind == "conv":
            out = int(rng.integers(1, 4))
            after = [
                (n + pads[i] + pads[i + 2] - (k - 1) * d - 1) // s + 1
                for i, (n, k, d, s) in enumerate([(height, kh, dh, sh), (width, kw, dw, sw)])
            ]
            if min(after) < 2:
                continue
            arrays[f"w{index}"], arrays[f"b{index}"] = rng.normal(size=(out, channels, kh, kw)), rng.normal(size=out)
            lines.append(f"{new} = Conv<pads={pads}, strides=[{sh},{sw}], dilations=[{dh},{dw}]>({current}, w{index}, b{index})")
            (height, width), channels = after, out
        elif kind in ("max", "average"):
            after = [(n - k) // s + 1 for n, k, s in [(height, kh, sh), (width, kw, sw)]]
            if min(after) < 2:
                continue
            lines.append(f"{new} = {kind.title()}Pool<kernel_shape=[{kh},{kw}], strides=[{sh},{sw}]>({current})")
            height, width = after
        elif kind == "norm":
            for letter in "stmv":
                arrays[f"n{letter}{index}"] = rng.uniform(0.2, 1, channels)
            lines.append(f"{new} = BatchNormalization({current}, ns{index}, nt{index}, nm{index}, nv{index})")
        elif kind == "act":
            lines.append(f"{new} = {rng.choice(['Relu', 'Sigmoid', 'Tanh', 'HardSwish'])}({current})")
        else:
            arrays[f"w{index}"] = rng.normal(size=(channels, channels, 3, 3))
            lines.append(f"a{index} = Conv<pads=[1,1,1,1]>({current}, w{index}) {new} = {rng.choice(['Add', 'Mul'])}({current}, a{index})")
        current = new
    lines.append(f"y = GlobalAveragePool({current})")
    text = f"g ({shape}) => (float[1,{channels},1,1] y) {{ {' '.join(lines)} }}"
    return text, {name: array.astype(np.float32) for name, array in arrays.items()}, (height, width)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_random_networks_have_the_properties(build, seed):
    rng = np.random.default_rng(seed)
    text, arrays, _ = random_text(rng)
    plain, model = build(text, arrays), build(text, arrays)
    x = rng.normal(size=list(plain.graph.inputs[0].shape))
    assert MaskAware().apply(model, Context()) == len(plain.graph)
    network = Interpreter(model, dtype="float64")
    expected = Interpreter(plain, dtype="float64")({"x": x})["y"].numpy()
    np.testing.assert_allclose(network({"x": x})["y"].numpy(), expected, rtol=0, atol=1e-10 * max(np.abs(expected).max(), 1e-3))
    mask = (rng.random((1, 1, *x.shape[2:])) < rng.choice([0.0, 0.1, 0.6])).astype(np.float64)
    first = network({"x": x, "mask": mask})["y"].numpy()
    assert np.isfinite(first).all()
    other = np.where(mask > 0, x, rng.normal(size=x.shape))
    np.testing.assert_array_equal(network({"x": other, "mask": mask})["y"].numpy(), first)


def test_canonical_form_is_kept(networks):
    model = masked(networks["mobile"][1].clone())
    x, mask = image(), keep(6)
    expected = outputs(model, x, mask)
    np.testing.assert_allclose(outputs(canonicalize(model), x, mask), expected, rtol=0, atol=1e-6)
