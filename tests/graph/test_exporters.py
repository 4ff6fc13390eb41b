"""What real exporters write, at many opsets, becomes the same whole operators, and computes what PyTorch does."""

from __future__ import annotations

import functools
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from torch import nn

from edgekit.graph.canonicalize import canonicalize
from edgekit.graph.census import WHOLE
from edgekit.graph.opset import to_opset
from tests.graph.exporter_modules import ACTIVATION, ATTENTION, CASES, NORMALIZATION, OTHERS, Case
from tests.graph.exporter_support import DYNAMO, SCRIPT, Exported, export, export_cases, run

GROUPS = {"attention": ATTENTION, "normalization": NORMALIZATION, "activation": ACTIVATION, "others": OTHERS}
QUICK = [(DYNAMO, 23), (SCRIPT, 17)]
SLOW = [(DYNAMO, 18), (DYNAMO, 20), (SCRIPT, 11), (SCRIPT, 13), (SCRIPT, 15)]
DIALECTS = [*QUICK, *(pytest.param(*dialect, marks=pytest.mark.slow) for dialect in SLOW)]
LEFT = {"Softmax", "Erf", "Pow", "Sqrt", "Reciprocal", "ReduceMean", "Tanh", "Exp", "Log", "IsNaN", "Where"}
"""Parts of whole operators."""
FOLDED = {"Shape", "Size", "Constant", "ConstantOfShape", "Expand", "Identity", "Dropout", "CastLike", "Range", "SequenceAt", "If", "Gemm"}
"""What static shapes and constants leave nothing of."""
TOLERANCE = 1e-5
VIEW_OF_SDPA = "torch's decomposition of scaled_dot_product_attention with a mask makes a view that it then refuses"


def refusal(name: str, exporter: str, opset: int) -> str | None:
    """Why an exporter cannot write a case at all; None when it can."""
    if exporter == DYNAMO:
        if name in ("swin, fused", "swin, fused, shifted"):
            return VIEW_OF_SDPA
        return "dynamo wants four axes" if name == "sdpa, three axes" else None
    if CASES[name].newest or name == "sdpa, groups":
        return "the TorchScript exporter does not know it"
    if opset < 13 and (name.startswith("vit block") or name == "unflatten"):
        return "unflatten came with opset 13"
    if opset < 14 and (name.startswith(("sdpa", "swin, fused", "vit block")) or name in ("timm, fused", "timm, q and k normalized")):
        return "scaled_dot_product_attention came with opset 14"
    return "Einsum came with opset 12" if opset < 12 and name == "einsum" else None


@functools.cache
def exported(group: str, exporter: str, opset: int) -> Exported:
    cases = {name: case for name, case in GROUPS[group].items() if refusal(name, exporter, opset) is None}
    return export_cases(cases, exporter, opset)


@functools.cache
def results(group: str, exporter: str, opset: int) -> dict[str, np.ndarray]:
    found = exported(group, exporter, opset)
    return run(found.canonical, found.feeds)


def _group(name: str) -> str:
    return next(group for group, cases in GROUPS.items() if name in cases)


@pytest.mark.parametrize(("exporter", "opset"), DIALECTS)
@pytest.mark.parametrize("name", CASES)
def test_whole_operators(name: str, exporter: str, opset: int) -> None:
    if (reason := refusal(name, exporter, opset)) is not None:
        pytest.skip(reason)
    case, found = CASES[name], exported(_group(name), exporter, opset)
    nodes = found.nodes(name)
    wanted = {op: nodes[op] for op in case.whole}
    assert wanted == case.whole
    unexpected = {op for op in nodes if op in (WHOLE | LEFT | FOLDED) and op not in case.whole and op not in case.plain}
    assert not unexpected
    result, expected = results(_group(name), exporter, opset)[found.outputs[name]], found.expected[name]
    assert result.shape == expected.shape
    assert np.abs(expected).max() > 0.01
    assert np.abs(result - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize(("exporter", "opset"), QUICK)
@pytest.mark.parametrize("group", GROUPS)
def test_what_every_canonical_graph_is(group: str, exporter: str, opset: int) -> None:
    found = exported(group, exporter, opset)
    model = found.canonical
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    nodes = [node.name for node in model.graph]
    values = [output.name for node in model.graph for output in node.outputs if output.name] + list(model.graph.initializers)
    assert all(nodes)
    assert len(set(nodes)) == len(nodes)
    assert len(set(values)) == len(values)
    assert [value.name for value in model.graph.outputs] == list(found.outputs.values())
    again = Counter(node.op_type for node in canonicalize(model.clone()).graph)
    assert again == Counter(node.op_type for node in model.graph)


class Deep(nn.Module):
    """Blocks within blocks, so that module paths have several parts."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([case.build(), case.build()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("name", ["vit block", "timm, written out", "layer norm by hand, pow, sqrt", "gelu by hand", "rms norm of llama"])
def test_module_paths_survive(name: str) -> None:
    """A whole operator belongs to the module that its parts did."""
    import torch

    from edgekit.graph.cost import MODULE_KEY
    from edgekit.source import Source
    from edgekit.trace import trace

    case = CASES[name]
    torch.manual_seed(0)
    model = trace(Source("deep", module=Deep(case).eval(), example_inputs=tuple(torch.randn(shape) for shape in case.shapes)), DYNAMO).model
    canonicalize(to_opset(model))
    whole = [node for node in model.graph if node.op_type in case.whole]
    assert len(whole) == 2 * sum(case.whole.values())
    for node in whole:
        path = node.metadata_props[MODULE_KEY]
        assert path.startswith(("blocks.0", "blocks.1"))
        assert str(node.name).startswith(path + "/")
    blocks = Counter(node.metadata_props[MODULE_KEY].split(".")[1] for node in whole)
    assert blocks["0"] == blocks["1"]


def test_a_value_called_like_a_buffer() -> None:
    """The exporter calls the Gather after its buffer `index`; written out, the two would be one."""
    import torch

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("add", torch.randn(4))

        def forward(self, x):
            return (x + self.add) * 2

    x = torch.randn(3, 4)
    module = Table()
    model = export(module, (x,), DYNAMO, 18)
    next(iter(model.graph)).outputs[0].name = "add"
    assert "add" in model.graph.initializers
    canonicalize(to_opset(model))
    (result,) = run(model, {str(model.graph.inputs[0].name): x.numpy()}).values()
    np.testing.assert_allclose(result, module(x).numpy(), rtol=1e-6)
