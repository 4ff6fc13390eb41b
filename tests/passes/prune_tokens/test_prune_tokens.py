"""The pass as a whole: what leaves a graph alone, what is refused and by which name, bad input, and the result on another runtime."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from edgekit import specs
from edgekit.contracts import Context
from edgekit.errors import EdgekitError, UsageError
from edgekit.graph.fingerprint import fingerprint
from edgekit.graph.shapes import infer_shapes
from edgekit.passes.prune_tokens.prune_tokens import PruneTokens
from tests.passes.prune_tokens.vit_graphs import Nodes, Vit, graph, random_feeds, random_weights

ANY = {"method": "random", "layers": (0,), "keep": 0.5}
METHODS = [
    {"method": "evit", "layers": (0,), "keep": 0.5},
    {"method": "evit", "layers": (0,), "keep": 0.5, "fuse": False},
    {"method": "attention-received", "layers": (0,), "keep": 0.5},
    {"method": "ia-red2", "layers": (1,), "keep": 0.5},
    {"method": "tome", "r": 2},
    {"method": "diffrate", "prune": (14, 12, 10, 8), "merge": (13, 11, 9, 7)},
    ANY,
]


def ids(options):
    return options["method"] + (" without fuse" if options.get("fuse") is False else "")


@pytest.mark.parametrize(
    "options",
    [
        {"method": "evit", "keep": 1.0},
        {"method": "evit", "keep": (1.0, 1.0), "layers": (0, 2)},
        {"method": "attention-received", "keep": 1},
        {"method": "ia-red2", "keep": 1.0},
        {"method": "random", "keep": 1.0},
        {"method": "tome", "r": 0},
        {"method": "tome", "r": (0, 0, 0, 0)},
        {"method": "diffrate", "prune": (17,) * 4, "merge": (17,) * 4},
        {"method": "diffrate", "prune": (99, 17, 20, 17), "merge": (30, 17, 99, 18)},
        {"method": "auto", "r": 0},
    ],
)
def test_nothing_to_remove(options):
    model = graph(Vit())
    before = fingerprint(model)
    assert PruneTokens(**options).apply(model, Context()) == 0
    assert fingerprint(model) == before


@pytest.mark.parametrize("vit", [Vit(patches=1), Vit(prefix=0, pool="mean", patches=1)])
@pytest.mark.parametrize(
    "options", [{"method": "tome", "r": 5}, {"method": "random", "keep": 0.1}, {"method": "attention-received", "keep": 0.1}]
)
def test_a_single_token_stays(vit, options, prune):
    _, context = prune(graph(vit), **options)
    assert context.rewrites == []


def test_a_step_that_the_class_token_alone_is_read_after(prune):
    """Nothing but the class token's own MLP and head would follow."""
    for options in ({"method": "evit", "layers": (3,)}, {"method": "tome", "r": (0, 0, 0, 2)}):
        _, context = prune(graph(Vit()), **options)
        assert context.rewrites == []


# What stands in the way, named. Each is put between the second and third block of a ViT without class token, or into the second attention.


def windows(add, x):
    """As in Swin: the tokens of a 4 × 4 map go into windows of 2 × 2 and back."""
    split = add("Reshape", x, add.constant([1, 2, 2, 2, 2, 32]), name="into windows")
    moved = add("Transpose", split, perm=[0, 1, 3, 2, 4, 5])
    back = add("Transpose", add("Reshape", moved, add.constant([1, 2, 2, 2, 2, 32])), perm=[0, 1, 3, 2, 4, 5])
    return add("Reshape", back, add.constant([1, 16, 32]))


def convolution(add, x):
    weight = add.constant(np.ones((32, 1, 3), np.float32))
    mixed = add("Conv", add("Transpose", x, perm=[0, 2, 1]), weight, group=32, pads=[1, 1], name="over the tokens")
    return add("Add", x, add("Transpose", mixed, perm=[0, 2, 1]))


def image(add, x):
    """As in CvT and LeViT: the tokens are a map again."""
    whole = add("Reshape", add("Transpose", x, perm=[0, 2, 1]), add.constant([1, 32, 4, 4]), name="into a map")
    pooled = add("MaxPool", whole, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    return add("Transpose", add("Reshape", pooled, add.constant([1, 32, 16])), perm=[0, 2, 1])


def mixer(add, x):
    """As in MLP-Mixer: a linear layer over the tokens."""
    return add("Add", x, add("MatMul", add.constant(np.ones((16, 16), np.float32)), x, name="token mixing"))


def shift(add, x):
    front = add("Slice", x, *map(add.constant, ([0], [15], [1], [1])), name="all but the last")
    last = add("Slice", x, *map(add.constant, ([15], [16], [1], [1])), name="the last")
    return add("Concat", last, front, axis=1)


BETWEEN = {
    "windows": (windows, "into windows", "splits the tokens into windows or rows"),
    "convolution": (convolution, "over the tokens", "Conv reads the tokens"),
    "image": (image, "into a map", "splits the tokens into windows or rows"),
    "mixer": (mixer, "token mixing", "mixes the tokens by a weight for each"),
    "shift": (shift, "the last", "picks the last token"),
}


@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("options", [{"method": "tome", "r": 2}, ANY], ids=ids)
def test_operators_that_need_all_tokens(name, options, refusal):
    between, where, why = BETWEEN[name]
    found = refusal(graph(Vit(prefix=0, pool="mean"), between=between), **options)
    assert found[0] == where
    assert why in found[1]


def changed(vit, change):
    """A graph whose second attention `change` replaces: it is given the Attention and returns the new one."""
    model = graph(vit)
    old = next(node for node in model.graph if node.name == "block1/attention")
    add = Nodes()
    new = change(add, old)
    new.name = old.name
    new.outputs[0].name = "attention1"
    for value in add.constants:
        model.graph.register_initializer(value)
    model.graph.insert_before(old, [*add.nodes, new])
    old.outputs[0].replace_all_uses_with(new.outputs[0])
    model.graph.remove(old, safe=True)
    infer_shapes(model)
    return model


def causal(add, old):
    return ir.node("Attention", old.inputs, {"is_causal": 1})


def grouped(add, old):
    """All four heads share the first of the keys and values."""
    shared = [add("Slice", value, *map(add.constant, ([0], [1], [1], [1])), name=f"shared{value.name}") for value in old.inputs[1:3]]
    return ir.node("Attention", [old.inputs[0], *shared])


def cached(add, old):
    """It gives out its keys and values for the next run."""
    new = ir.node("Attention", old.inputs, num_outputs=3)
    for output, name in zip(new.outputs[1:], ("keys", "values"), strict=True):
        output.name, output.shape, output.type = name, old.inputs[1].shape, old.inputs[1].type
    return new


def past(add, old):
    """It goes on from the keys and values of the run before."""
    before = [add.constant(np.ones((1, 4, 3, 8), np.float32), name) for name in ("past_keys", "past_values")]
    new = ir.node("Attention", [*old.inputs, None, *before], num_outputs=3)
    new.outputs[1].name, new.outputs[2].name = "keys", "values"
    return new


def capped(add, old):
    return ir.node("Attention", old.inputs, {"softcap": 5.0})


@pytest.mark.parametrize("options", METHODS, ids=ids)
@pytest.mark.parametrize(
    ("change", "why"), [(causal, "causal"), (cached, "keeps its keys and values"), (past, "keeps its keys and values")]
)
def test_attention_that_needs_all_tokens(change, why, options, refusal):
    where, found = refusal(changed(Vit(), change), **options)
    assert where == "block1/attention"
    assert why in found


@pytest.mark.parametrize(
    "options",
    [METHODS[0] | {"layers": (0, 1)}, METHODS[2] | {"layers": (0, 1)}, METHODS[3] | {"layers": (0, 2), "keep": (0.9, 0.5)}, *METHODS[4:6]],
    ids=ids,
)
def test_shared_keys(options, refusal):
    """Also where the attention before would have been scored and shortened: nothing is changed then either."""
    where, why = refusal(changed(Vit(), grouped), **options)
    assert where == "block1/attention"
    assert "share keys" in why


@pytest.mark.parametrize("options", [METHODS[0] | {"layers": (0, 1)}, METHODS[2] | {"layers": (1,)}, METHODS[5]], ids=ids)
def test_capped_logits(options, refusal):
    where, why = refusal(changed(Vit(), capped), **options)
    assert where == "block1/attention"
    assert "capped" in why


@pytest.mark.parametrize("change", [grouped, capped])
def test_what_does_not_read_attention_does_not_mind(change, prune):
    _, context = prune(changed(Vit(), change), method="random", layers=(0, 1), keep=0.5)
    assert context.refusals == []
    assert len(context.rewrites) == 2


def test_a_graph_that_was_pruned_already(prune, refusal):
    """What chooses the tokens needs them all."""
    pruned, _ = prune(graph(Vit()), **METHODS[0])
    assert "TopK reads the tokens" in refusal(pruned, method="tome", r=2)[1]


def test_tokens_that_are_given_out(refusal):
    vit = Vit()
    model = graph(vit)
    stream = next(node for node in model.graph if node.name == "block2/sum").outputs[0]
    model.graph.outputs.append(stream)
    assert refusal(model, **ANY) == ("block2/sum", "the graph gives out the tokens themselves")


@pytest.mark.parametrize("vit", [Vit(table=True), Vit(mask="bool"), Vit(rotary=True)])
@pytest.mark.parametrize("options", [METHODS[0], METHODS[4], METHODS[5]], ids=ids)
def test_tables_and_masks_are_not_merged(vit, options, refusal):
    assert "cannot be merged" in refusal(graph(vit), **options)[1]


def test_a_graph_without_attention(build, refusal):
    model = build("net (float[1,4,8] x) => (float[1,4,8] y) { y = Relu(x) }")
    assert refusal(model, method="tome") == ("the graph", "it has no self-attention with a residual sum over tokens [B, N, C]")


# Bad input: an error that says what and where, never a traceback, and never a changed graph.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "a share of 0 of the tokens"),
        ({"keep": 1.5}, "a share of 1.5 of the tokens"),
        ({"keep": (0.5, -0.1)}, "a share of -0.1"),
        ({"keep": float("nan")}, "a share of nan"),
        ({"r": -1}, "a negative number of tokens"),
        ({"method": "diffrate", "prune": (5,), "merge": (5, 4)}, "1 counts to prune to and 2 to merge to"),
        ({"method": "diffrate"}, "needs counts or a budget"),
        ({"target_macs": 0.0}, "a budget of 0"),
        ({"target_macs": 1.0}, "a budget of 1"),
        ({"target_macs": 0.5, "keep": 0.5}, "exclude each other"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(UsageError, match=message) as error:
        PruneTokens(**options)
    assert error.value.fix


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "evit", "layers": (4,)}, "there is no layer 4: the model has 4 blocks, 0 to 3"),
        ({"method": "evit", "layers": (-1,)}, "there is no layer -1"),
        ({"method": "ia-red2", "layers": (7,)}, "there is no layer 7"),
        ({"method": "evit", "layers": (2, 1)}, "the layers are not in order"),
        ({"method": "evit", "layers": (1, 1)}, "the layers are not in order"),
        ({"method": "evit", "layers": (1, 2), "keep": (0.5, 0.4, 0.3)}, "3 ratios do not fit 2 layers"),
        ({"method": "tome", "r": (1, 2, 3)}, "3 counts do not fit 4 blocks"),
        ({"method": "diffrate", "prune": (9, 9), "merge": (9, 9)}, "2 counts do not fit 4 blocks"),
        ({"method": "diffrate", "prune": (9, 9, 1, 1), "merge": (9, 9, 1, 1)}, "leaves no token in block 2"),
        ({"method": "diffrate", "prune": (9, 0, 0, 0), "merge": (9, 0, 0, 0)}, "leaves no token in block 1"),
        ({"method": "ia-red2", "layers": (0,), "keep": 0.05}, "leaves no token in block 0"),
    ],
)
def test_options_that_do_not_fit_the_model(options, message):
    model = graph(Vit())
    before = fingerprint(model)
    with pytest.raises(UsageError, match=message) as error:
        PruneTokens(**options).apply(model, Context())
    assert error.value.fix
    assert fingerprint(model) == before


@pytest.mark.parametrize("options", [METHODS[0], METHODS[3], METHODS[5]], ids=ids)
def test_a_model_without_class_token(options):
    model = graph(Vit(prefix=0, pool="mean"))
    before = fingerprint(model)
    with pytest.raises(UsageError, match=f"the method '{options['method']}' scores tokens by the class token, and the model reads none"):
        PruneTokens(**options).apply(model, Context())
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    "text",
    ["prune-tokens{keep=0}", "prune-tokens{keep=two}", "prune-tokens{method=best}", "prune-tokens{layers=3,x=1}", "prune-tokens{r=1.5}"],
)
def test_bad_options_on_the_command_line(text):
    with pytest.raises(EdgekitError):
        specs.make_pass(text)


def test_a_recipe_repeats_the_pass():
    wanted = PruneTokens(method="evit", keep=(0.9, 0.7), layers=(3, 6), fuse=False, form="rank")
    assert specs.make_pass(specs.format_spec("prune-tokens", wanted)) == wanted


def test_settings_for_an_accuracy_budget():
    """From the strongest on, but one alone where the strength was given."""
    shares = [setting.target_macs for setting in PruneTokens().settings()]
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] < 1
    for given in ({"keep": 0.5}, {"r": 3}, {"layers": (2,)}, {"target_macs": 0.5}):
        assert PruneTokens(**given).settings() == [PruneTokens(**given)]


OPENVINO = [
    *METHODS,
    {"method": "tome", "r": 2, "form": "scatter"},
    {"method": "tome", "r": 2, "form": "rank"},
    METHODS[0] | {"form": "rank"},
]


@pytest.mark.parametrize("batch", [1, 3])
def test_openvino_gives_what_onnx_runtime_gives(batch, prune, run, tmp_path):
    pytest.importorskip("openvino")
    from edgekit.targets.openvino import OpenVino

    vit = Vit(depth=4, batch=batch)
    weights, feeds = random_weights(vit), random_feeds(vit)
    for number, options in enumerate(OPENVINO):
        pruned, _ = prune(graph(vit, weights), **options)
        expected = run(pruned, feeds)[0]
        target = dataclasses.replace(OpenVino(), precision="fp32")
        folder = tmp_path / str(number)
        folder.mkdir()
        target.legalize(pruned)
        target.lower(pruned, folder)
        found = target.load(folder, 1).run(feeds)["logits"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4, err_msg=str(options))
