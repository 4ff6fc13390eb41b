"""Seeded faults: each is named at every level that it has, within the bound, and its remedy and its file are checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cloudpickle
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgekit.bisection.finding import Finding
from edgekit.bisection.run import bisect_files, bisect_job
from edgekit.compiler import Job
from edgekit.contracts import Pass, register_target
from edgekit.isolation import Worker
from edgekit.passes.reparameterize.fold_batch_norm import FoldBatchNorm
from edgekit.passes.to_float16 import ToFloat16
from edgekit.progress import Reporter
from edgekit.recipe import Recipe
from tests.bisection import faults, networks
from tests.bisection.faults import FaultyFold, FaultyMerge, FaultyTarget, Rewrite, attribute, drop, exchange, operator, weight

cloudpickle.register_pickle_by_value(faults)  # the worker need not find the tests
register_target(FaultyTarget)

INT, FLOAT, INTS = ir.AttrInt64, ir.AttrFloat32, ir.AttrInt64s


@dataclass(frozen=True)
class Fault:
    """A seeded fault and what must be found.

    Attributes:
        network: The network.
        passes: The passes, one of them at fault.
        stage: Its specification begins with this.
        places: The rewritten places at fault.
        node: Name of the node.
        role: Which operand.
        tensor: What the operand's name holds.
        text: What its description holds.
        remedy: What the options of the remedy that works hold.
    """

    network: Callable[[], onnx.ModelProto]
    passes: tuple[Pass, ...]
    stage: str
    places: tuple[str, ...]
    node: str
    role: str
    tensor: str
    text: str
    remedy: str


def rewrite(operators: str, at: str, change: faults.Change) -> Rewrite:
    return Rewrite((operators,), (at,), change)


def tokens(item: Rewrite, role: str, tensor: str, text: str) -> Fault:
    """A fault of the pass `test-rewrite` in the transformer, after a pass that does nothing wrong."""
    (place,) = item.at
    return Fault(
        networks.tokens, (Rewrite(("Sigmoid",)), item), "test-rewrite", (place,), place, role, tensor, text, f"--skip test-rewrite:{place}"
    )


def overflow() -> onnx.ModelProto:
    return networks.ranges(3e5, 1e-3)


def vanishing() -> onnx.ModelProto:
    return networks.ranges(1e3, 2.0**-20 / 1e3)


SIGN = np.array([1, -1, 1, 1, -1, 1, 1, 1], np.float32)

FAULTS = {
    "wrong epsilon in a folded batch norm": Fault(
        networks.convolutional, (FaultyFold(at="n2/BatchNormalization"),), "faulty-fold", ("n2/BatchNormalization",), "c2/Conv",
        "operand 1 and operand 2", "c2_weight, c2_bias", "scaled by a factor of its own at each index of axis 1",
        "--skip faulty-fold:n2/BatchNormalization",
    ),
    "padding on one side in a merged branch": Fault(
        networks.convolutional, (FoldBatchNorm(), FaultyMerge(at="s1/Add")), "faulty-merge", ("s1/Add",), "s1/Add/Conv",
        "attribute", "pads", "[2, 2, 0, 0] instead of [1, 1, 1, 1]", "--skip faulty-merge:s1/Add",
    ),
    "transposed weight": tokens(rewrite("MatMul", "k1_m/MatMul", weight(1, np.transpose)), "operand 1", "k1_weight", "transposed"),
    "permuted channels": tokens(
        rewrite("MatMul", "u0_m/MatMul", weight(1, lambda w: w[:, [0, 2, 1, 3, 4, 5, 7, 6]])),
        "operand 1", "u0_weight", "permuted along axis 1: 4"
    ),
    "bias shifted by one": tokens(rewrite("Add", "p1/Add", weight(1, lambda b: np.roll(b, 1))), "operand 1", "p1_bias", "shifted by 1"),
    "bias of the wrong sign": tokens(rewrite("Add", "v0/Add", weight(1, np.negative)), "operand 1", "v0_bias", "opposite sign"),
    "scale applied twice": tokens(rewrite("Mul", "m1/Mul", weight(1, np.square)), "operand 1", "m1_factor", "constant factor 7"),
    "zeros in a weight": tokens(
        rewrite("MatMul", "q0_m/MatMul", weight(1, lambda w: w * (np.arange(8) < 6))),
        "operand 1", "q0_weight", "are zero where they were not"
    ),
    "wrong axis of a softmax": tokens(rewrite("Softmax", "w0/Softmax", attribute(INT("axis", 1))), "attribute", "axis", "1 instead of -1"),
    "wrong perm of a transpose": tokens(
        rewrite("Transpose", "d0/Transpose", attribute(INTS("perm", [0, 1, 2]))), "attribute", "perm", "[0, 1, 2] instead of [0, 2, 1]"
    ),
    "wrong epsilon in a layer norm": tokens(
        rewrite("LayerNormalization", "l1/LayerNormalization", attribute(FLOAT("epsilon", 0.1))),
        "attribute", "epsilon", "0.1 instead of 1e-05"
    ),
    "exchanged Q and K": tokens(rewrite("Attention", "o1/Attention", exchange(0, 1)), "operands", "k1, q1", "wrong order"),
    "wrong number of heads": tokens(
        rewrite("Attention", "o0/Attention", lambda m, n: [attribute(INT(f"{x}_num_heads", 4))(m, n) for x in ("q", "kv")] and None),
        "attribute", "kv_num_heads, q_num_heads", "4 instead of 2, 4 instead of 2",
    ),
    "wrong scale of scores": tokens(
        rewrite("Attention", "o1/Attention", attribute(FLOAT("scale", 1.0))), "attribute", "scale", "1 instead of the default"
    ),
    "another operator": tokens(rewrite("Tanh", "z1/Tanh", operator("Softsign")), "operator", "Softsign", "Softsign where Tanh was"),
    "missing bias": Fault(
        networks.convolutional, (Rewrite(("Conv",), ("a3/Conv",), drop(2)),), "test-rewrite", ("a3/Conv",), "a3/Conv",
        "operand 2", "a3_bias", "missing", "--skip test-rewrite:a3/Conv",
    ),
    "wrong number of groups": Fault(
        networks.convolutional, (Rewrite(("GroupNormalization", "Relu"), ("g/GroupNormalization",), attribute(INT("num_groups", 2))),),
        "test-rewrite", ("g/GroupNormalization",), "g/GroupNormalization", "attribute", "num_groups", "2 instead of 4",
        "--skip test-rewrite:g/GroupNormalization",
    ),
    "float16 overflow": Fault(
        overflow, (ToFloat16(overflow="ignore"),), "to-float16", ("more/Mul",), "more/Mul", "result", "more", "float16 ends at 65504",
        'keep=["more/Mul"]'
    ),
    "values that vanish in float16": Fault(
        vanishing, (ToFloat16(overflow="ignore"),), "to-float16", ("less/Mul", "back/Mul"), "less/Mul", "result", "less", "zero in float16",
        'keep=["less/Mul","back/Mul"]',
    ),
}  # fmt: skip


@pytest.fixture
def save(tmp_path: Path) -> Callable[[onnx.ModelProto, str], Path]:
    def write(model: onnx.ModelProto, name: str = "net.onnx") -> Path:
        onnx.save(model, tmp_path / name)
        return tmp_path / name

    return write


def job(path: Path, passes: tuple[Pass, ...] = (), target: str = "", precision: str = "fp32") -> Job:
    return Job(Recipe(str(path), target, precision, calibration=2, threads=1), passes=passes)


def assert_within_bounds(finding: Finding) -> None:
    """At most ⌈log2 N⌉ + 3 evaluations at each level."""
    if finding.stage is not None:
        assert finding.stage.evaluations <= math.ceil(math.log2(len(finding.stage.stages) - 1)) + 3
    if finding.rewrite is not None and finding.rewrite.places:
        assert max(finding.rewrite.evaluations) <= math.ceil(math.log2(finding.rewrite.count)) + 3
    if finding.node is not None:
        assert finding.node.evaluations <= finding.node.bound


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_a_pass_is_named(name: str, save, worker: Worker, tmp_path: Path) -> None:
    fault = FAULTS[name]
    finding = bisect_job(job(save(fault.network()), fault.passes), None, tmp_path / "out", reporter=Reporter(), worker=worker)
    assert not finding.agree
    assert finding.stage is not None
    assert finding.stage.name.startswith(fault.stage)
    assert finding.stage.position == 1 + len(fault.passes)
    assert finding.rewrite is not None
    assert finding.rewrite.places == fault.places
    assert finding.rewrite.complete
    assert finding.node is not None
    assert finding.node.node.name == fault.node
    assert finding.tensor is not None
    assert (finding.tensor.role, finding.tensor.name) == (fault.role, fault.tensor)
    assert fault.text in finding.tensor.text
    assert_within_bounds(finding)
    assert finding.reproducer is not None
    assert finding.reproducer.shows
    assert finding.reproducer.nodes <= 2
    assert finding.remedy is not None
    assert fault.remedy in finding.remedy.remedy.options


def test_a_target_with_more_digits_does_not_hide_a_fault(save, worker: Worker) -> None:
    item = ToFloat16(overflow="ignore")
    finding = bisect_job(job(save(overflow()), (item,), "onnxruntime"), None, None, reporter=Reporter(), worker=worker)
    assert finding.stage is not None
    assert finding.stage.name == 'to-float16{overflow="ignore"}'
    assert finding.rewrite is not None
    assert finding.rewrite.places == ("more/Mul",)
    assert finding.remedy is not None
    assert_within_bounds(finding)


def test_the_numbers_of_an_overflow(save, worker: Worker) -> None:
    finding = bisect_job(job(save(overflow()), (ToFloat16(overflow="ignore"),)), None, None, reporter=Reporter(), worker=worker)
    assert finding.tensor is not None
    worst = finding.tensor.difference
    assert worst is not None
    assert math.isinf(worst.found)
    assert 65504 < abs(worst.expected) <= 3e5
    assert worst.channel == worst.index[-1]


@pytest.mark.parametrize(
    ("target", "precision", "role", "remedy"),
    [
        ('test-faulty{operator="Softmax",becomes="LogSoftmax"}', "fp32", "result", None),
        ('test-faulty{operator="Div",only_half=true}', "fp16", "operand 0", "--precision fp32"),
    ],
)
def test_a_fault_of_a_target_is_named(
    target: str, precision: str, role: str, remedy: str | None, save, worker: Worker, tmp_path: Path
) -> None:
    half = precision == "fp16"
    path = save(overflow() if half else networks.tokens())
    finding = bisect_job(job(path, (Rewrite(("Tanh",)),), target, precision), None, tmp_path / "out", reporter=Reporter(), worker=worker)
    assert finding.stage is not None
    assert finding.stage.name == "lowered"
    assert finding.rewrite is None
    assert finding.node is not None
    assert finding.node.node.name == ("down/Div" if half else "w0/Softmax")
    assert finding.node.alone
    assert finding.node.evaluations <= math.ceil(math.log2(37)) + 3
    assert finding.tensor is not None
    assert finding.tensor.role == role
    assert finding.tensor.name == ("more" if half else "w0")
    assert_within_bounds(finding)
    assert finding.reproducer is not None
    assert finding.reproducer.shows
    assert finding.reproducer.nodes == 1
    assert (finding.remedy.remedy.options if finding.remedy else None) == remedy


def test_a_fault_of_an_exporter_is_named(save, worker: Worker, tmp_path: Path) -> None:
    good, bad = networks.convolutional(), networks.convolutional()
    value = next(item for item in bad.graph.initializer if item.name == "a2_weight")
    value.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(value)[[0, 2, 1, 3]], "a2_weight"))
    first, second = save(good, "good.onnx"), save(bad, "bad.onnx")
    finding = bisect_files(job(first), second, None, tmp_path / "out", reporter=Reporter(), worker=worker)
    assert finding.stage is None
    assert finding.node is not None
    assert finding.node.node.name == "a2/Conv"
    assert finding.tensor is not None
    assert finding.tensor.name == "a2_weight"
    assert "permuted along axis 0: 2 slices" in finding.tensor.text
    assert finding.reproducer is not None
    assert finding.reproducer.shows


def test_two_files_whose_values_have_other_names(save, worker: Worker) -> None:
    good, bad = networks.tokens(), networks.tokens()
    for node in bad.graph.node:
        node.input[:] = [name if name == "x" or "_" in name[1:] else f"{name}_other" for name in node.input]
        node.output[:] = [f"{name}_other" if "_" not in name else f"{name}" for name in node.output]
    bad.graph.output[0].name = "y_other"
    first = save(good, "good.onnx")
    assert bisect_files(job(first), save(bad, "same.onnx"), None, None, reporter=Reporter(), worker=worker).agree
    next(node for node in bad.graph.node if node.name == "w1/Softmax").attribute[0].i = 1
    finding = bisect_files(job(first), save(bad, "bad.onnx"), None, None, reporter=Reporter(), worker=worker)
    assert finding.node is not None
    assert finding.node.node.name == "w1/Softmax"
    assert finding.tensor is not None
    assert finding.tensor.name == "axis"


def test_two_culprits_in_one_pass(save, worker: Worker) -> None:
    places = ("q0_m/MatMul", "u1_m/MatMul")
    item = Rewrite(("MatMul",), places, weight(1, np.negative))
    finding = bisect_job(job(save(networks.tokens()), (item,)), None, None, reporter=Reporter(), worker=worker)
    assert finding.rewrite is not None
    assert finding.rewrite.places == places
    assert finding.rewrite.complete
    assert finding.remedy is not None
    assert finding.remedy.remedy.skip == {"test-rewrite": places}
    assert_within_bounds(finding)


def test_all_stages_agree(save, worker: Worker) -> None:
    recipe = job(save(networks.convolutional()), (FoldBatchNorm(),), "onnxruntime")
    finding = bisect_job(recipe, None, None, reporter=Reporter(), worker=worker)
    assert finding.agree
    assert finding.stage is not None
    assert finding.stage.evaluations == 2  # the artifact, and the graph that it was made from
    assert finding.node is None
    assert finding.remedies == []


def test_a_pass_that_does_not_heed_what_to_skip(save, worker: Worker) -> None:
    @dataclass(frozen=True)
    class Deaf(Rewrite):
        name = "deaf"

        def apply(self, model: ir.Model, context: object) -> int:
            from edgekit.contracts import Context

            assert isinstance(context, Context)
            return super().apply(model, Context(context.calibration, rewrites=context.rewrites))

    item = Deaf(("MatMul",), ("k1_m/MatMul",), weight(1, np.transpose))
    finding = bisect_job(job(save(networks.tokens()), (item,)), None, None, reporter=Reporter(), worker=worker)
    assert finding.rewrite is not None
    assert finding.rewrite.places == ()
    assert "does not heed" in finding.rewrite.why_not
    assert finding.node is not None
    assert finding.node.node.name == "k1_m/MatMul"
    assert finding.remedy is not None
    assert finding.remedy.remedy.options == "--no-passes"


def test_min_sqnr_is_what_an_approximate_pass_is_held_to(save, worker: Worker) -> None:
    path = save(networks.convolutional())
    assert bisect_job(job(path, (ToFloat16(overflow="ignore"),)), 20.0, None, reporter=Reporter(), worker=worker).agree
    finding = bisect_job(job(path, (ToFloat16(overflow="ignore"),)), 120.0, None, reporter=Reporter(), worker=worker)
    assert finding.stage is not None
    assert finding.stage.name.startswith("to-float16")
    assert "120 dB are asked for" in finding.stage.why
