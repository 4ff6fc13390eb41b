"""The report of what runs where: each rule on packages that coremltools' builder writes, as plain data, and on the command line."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Program, get_new_symbol, types
from coremltools.models import compute_plan
from rich.console import Console
from typer.testing import CliRunner

from edgekit.cli.app import app
from edgekit.cli.placement import findings_table, placement_table
from edgekit.cli.session import Session
from edgekit.contracts import Target, targets
from edgekit.errors import MissingToolError, SourceError
from edgekit.targets.coreml import CoreMl
from edgekit.targets.coreml.placement import Placement, measured, placement, with_plan
from edgekit.targets.coreml.placement_rules import COPY, LEAVES, RISK, RULES

Shapes = dict[str, tuple[tuple[Any, ...], Any]]
FP16, FP32, INT32 = types.fp16, types.fp32, types.int32
IMAGE: Shapes = {"x": ((1, 8, 32, 32), FP16)}


def saved(folder: Path, build: Callable[..., Any], inputs: Shapes = IMAGE) -> Path:
    """A package with what `build` makes of placeholders, as it is: no pass of coremltools runs."""
    program = Program()
    with Function({name: mb.placeholder(shape, kind) for name, (shape, kind) in inputs.items()}, opset_version=ct.target.iOS18) as function:
        results = build(**function.inputs)
        function.set_outputs(list(results) if isinstance(results, (list, tuple)) else [results])
    program.add_function("main", function)
    model = ct.convert(
        program,
        source="milinternal",
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    model.save(str(folder / "model.mlpackage"))
    return folder / "model.mlpackage"


def report(folder: Path, build: Callable[..., Any], inputs: Shapes = IMAGE) -> Placement:
    return placement(saved(folder, build, inputs))


def half(*shape: int) -> np.ndarray:
    return np.full(shape, 0.5, np.float16)


def conv(x: Any, *kernel: int, **options: Any) -> Any:
    return mb.conv(x=x, weight=half(8, 8, *kernel), pad_type="same", **options)


LAST = np.array([-1], np.int32)
TABLE: dict[str, tuple[Callable[..., Any], Shapes, str, str]] = {
    "float32": (lambda x: mb.relu(x=x), {"x": ((1, 8, 32, 32), FP32)}, LEAVES, "typed float32"),
    "integers": (lambda x: mb.add(x=x, y=np.int32(1)), {"x": ((1, 64), INT32)}, LEAVES, "computes int32"),
    "cast to integers": (lambda x: mb.cast(x=x, dtype="int32"), IMAGE, LEAVES, "cast to int32"),
    "range of sizes": (lambda x: mb.relu(x=x), {"x": ((1, get_new_symbol()), FP16)}, LEAVES, "size known only"),
    "long axis": (lambda x: mb.relu(x=x), {"x": ((1, 8, 1, 16385), FP16)}, LEAVES, "an axis of 16385"),
    "long weight": (lambda x: mb.linear(x=x, weight=half(16385, 32)), {"x": ((1, 32), FP16)}, LEAVES, "an axis of 16385"),
    "gather": (
        lambda x, i: mb.gather(x=x, indices=i, axis=1), {**IMAGE, "i": ((4,), INT32)}, LEAVES, "computed indices",
    ),
    "topk": (lambda x: mb.topk(x=x, k=4, axis=-1), IMAGE, LEAVES, "reported on the CPU"),
    "argsort": (lambda x: mb.argsort(x=x, axis=-1), IMAGE, LEAVES, "rejected on M1"),
    "cumsum": (lambda x: mb.cumsum(x=x, axis=1), IMAGE, LEAVES, "cumsum"),
    "product": (lambda x: mb.reduce_prod(x=x, axes=LAST), IMAGE, LEAVES, "without a path"),
    "nonzero": (lambda x: mb.non_zero(x=x), IMAGE, LEAVES, "without a path"),
    "lstm": (
        lambda x: mb.lstm(x=x, initial_h=half(1, 4), initial_c=half(1, 4), weight_ih=half(16, 3), weight_hh=half(16, 4))[0],
        {"x": ((5, 1, 3), FP16)}, LEAVES, "RNN and LSTM",
    ),
    "branch": (
        lambda x: mb.cond(
            pred=mb.greater(x=mb.reduce_sum(x=x, axes=[0, 1, 2, 3], keep_dims=False), y=np.float16(0)),
            _true_fn=lambda: mb.relu(x=x), _false_fn=lambda: mb.tanh(x=x),
        ),
        IMAGE, LEAVES, "control flow",
    ),
    "bilinear": (lambda x: mb.upsample_bilinear(x=x, scale_factor_height=2, scale_factor_width=2), IMAGE, LEAVES, "native from A14"),
    "wide kernel": (lambda x: conv(x, 3, 15), IMAGE, LEAVES, "kernel width 15"),
    "tall kernel": (lambda x: conv(x, 31, 3), IMAGE, LEAVES, "kernel height 31"),
    "dilation": (lambda x: conv(x, 3, 3, dilations=np.array([9, 9], np.int32)), IMAGE, LEAVES, "dilation 9"),
    "three axes": (lambda x: conv(x, 3, 3, 3), {"x": ((1, 8, 4, 32, 32), FP16)}, LEAVES, "three axes"),
    "linear of rank 5": (lambda x: mb.linear(x=x, weight=half(32, 32)), {"x": ((1, 2, 2, 2, 32), FP16)}, LEAVES, "rank 5"),
    "mirror": (lambda x: mb.pad(x=x, pad=np.array([1, 1, 1, 1], np.int32), mode="reflect"), IMAGE, LEAVES, "reflect padding"),
    "pad channels": (lambda x: mb.pad(x=x, pad=np.array([1, 0, 0, 0, 0, 0], np.int32), mode="constant",
                                      constant_val=np.float16(0)), IMAGE, LEAVES, "pads other axes"),
    "long argmax": (lambda x: mb.reduce_argmax(x=x, axis=-1), {"x": ((1, 2049), FP16)}, LEAVES, "an axis of 2049"),
    "one wide": (lambda x: mb.reduce_max(x=x, axes=LAST, keep_dims=True), IMAGE, COPY, "32× the memory"),
    "seven wide": (lambda x: mb.relu(x=x), {"x": ((1, 8, 7, 7), FP16)}, COPY, "a last axis of 7 × 2 bytes"),
    "transpose": (lambda x: mb.transpose(x=x, perm=np.array([0, 2, 3, 1], np.int32)), IMAGE, COPY, "a transpose"),
    "reshape": (lambda x: mb.reshape(x=x, shape=np.array([1, 8, 1024], np.int32)), IMAGE, COPY, "a reshape"),
    "mask": (lambda x: mb.add(x=x, y=np.float32(-1e9)), {"x": ((1, 8, 32, 32), FP32)}, RISK, "reaches 1e+09"),
    "infinite mask": (lambda x: mb.add(x=x, y=np.float16(-np.inf)), IMAGE, RISK, "holds infinity"),
    "vanishing": (lambda x: mb.add(x=x, y=np.float32(1e-12)), {"x": ((1, 8, 32, 32), FP32)}, RISK, "1e-12 is zero"),
    "subnormal": (lambda x: mb.add(x=x, y=np.float16(1e-6)), IMAGE, RISK, "below float16's smallest normal"),
    "norm": (lambda x: mb.layer_norm(x=x, axes=LAST, epsilon=np.float16(1e-12)), IMAGE, RISK, "its ε is zero"),
    "exp": (lambda x: mb.exp(x=x), IMAGE, RISK, "x > 11.09"),
    "softplus": (lambda x: mb.softplus(x=x), IMAGE, RISK, "10.4"),
    "log-sum-exp": (lambda x: mb.reduce_log_sum_exp(x=x, axes=LAST), IMAGE, RISK, "x > 7.62"),
    "square": (lambda x: mb.square(x=x), IMAGE, RISK, "|x| > 255.9"),
    "cube": (lambda x: mb.pow(x=x, y=np.float16(3)), IMAGE, RISK, "|x| > 40.31"),
    "sum of squares": (lambda x: mb.reduce_sum_square(x=x, axes=np.array([2, 3], np.int32)), IMAGE, RISK, "sum of 1024 squares"),
    "sum": (lambda x: mb.reduce_sum(x=x, axes=np.array([2, 3], np.int32)), IMAGE, RISK, "sum of 1024 elements"),
    "there and back": (
        lambda x: mb.cast(x=mb.cast(x=x, dtype="fp16"), dtype="fp32"), {"x": ((1, 32), FP32)}, RISK, "rounded to float16 and back",
    ),
    "integers to float16": (lambda x: mb.cast(x=x, dtype="fp16"), {"x": ((1, 32), INT32)}, RISK, "integers above 2048"),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_each_rule_names_the_operation_and_a_source(case: str, tmp_path: Path) -> None:
    build, inputs, kind, says = TABLE[case]
    found = [item for item in report(tmp_path, build, inputs).findings if item.kind == kind and says in item.reason]
    assert len(found) == 1
    assert found[0].source in {rule.source for rule in RULES}
    assert found[0].operation


CLEAN: dict[str, tuple[Callable[..., Any], Shapes]] = {
    "network": (lambda x: mb.softmax(x=mb.relu(x=conv(x, 3, 3)), axis=1), IMAGE),
    "constant indices": (lambda x: mb.gather(x=x, indices=np.array([1, 0], np.int32), axis=1), IMAGE),
    "shifted exp": (lambda x: mb.exp(x=mb.sub(x=x, y=mb.reduce_max(x=x, axes=np.array([1], np.int32), keep_dims=True))), IMAGE),
    "unit axes": (lambda x: mb.reshape(x=x, shape=np.array([8, 1, 32, 32], np.int32)), IMAGE),
    "casts at the border": (lambda x: mb.cast(x=x, dtype="fp16"), {"x": ((1, 32), FP32)}),
    "wide channels": (lambda x: mb.relu(x=x), {"x": ((1, 65536, 1, 32), FP16)}),
    "default ε": (lambda x: mb.rsqrt(x=x), IMAGE),
    "limits": (lambda x: mb.pad(x=conv(x, 29, 13), pad=np.array([1, 1], np.int32), constant_val=np.float16(0)), IMAGE),
}


@pytest.mark.parametrize("case", CLEAN)
def test_what_is_fine_is_not_named(case: str, tmp_path: Path) -> None:
    build, inputs = CLEAN[case]
    assert report(tmp_path, build, inputs).findings == ()


def test_rules_name_operators_that_exist_and_sources_that_can_be_looked_up() -> None:
    from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

    for rule in RULES:
        assert set(rule.operators.split()) - {"custom_layer", "coreml_update_state"} <= set(SSAOpRegistry.core_ops), rule.operators
        assert rule.source.startswith(("https://", "IEEE"))


def test_counts_totals_and_json(tmp_path: Path) -> None:
    def build(x: Any) -> Any:
        return mb.exp(x=mb.transpose(x=mb.exp(x=conv(x, 3, 3)), perm=np.array([0, 2, 3, 1], np.int32)))

    found = report(tmp_path, build)
    assert found.operators == {"exp": 2, "conv": 1, "transpose": 1}
    # the two last values end in an axis of 8, which is padded; the transpose copies besides
    assert found.totals == {"operations": 4, LEAVES: 0, COPY: 2, RISK: 2}
    plain = json.loads(json.dumps(found.to_dict()))
    assert {item["kind"] for item in plain["findings"]} == {COPY, RISK}
    assert plain["findings"][0].keys() == {"operation", "operator", "reason", "source", "kind"}
    assert CoreMl.describe_file(tmp_path / "model.mlpackage") == found.describe()


def test_states(tmp_path: Path) -> None:
    with Function({"s": mb.state_tensor_placeholder((1, 33), FP16), "t": mb.state_tensor_placeholder((1, 64), FP16)}, ct.target.iOS18) as f:
        f.set_outputs([mb.read_state(input=f.inputs["s"]), mb.read_state(input=f.inputs["t"])])
    program = Program()
    program.add_function("main", f)
    options = {"skip_model_load": True, "pass_pipeline": ct.PassPipeline.EMPTY, "minimum_deployment_target": ct.target.iOS18}
    ct.convert(program, source="milinternal", convert_to="mlprogram", **options).save(str(tmp_path / "s.mlpackage"))
    assert [item.reason[:33] for item in placement(tmp_path / "s.mlpackage").findings] == ["a state whose last axis is 33, no"]


def test_a_damaged_program_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, lambda x: mb.exp(x=mb.relu(x=x)))
    file = next(path.rglob("*.mlmodel"))
    spec = ct.proto.Model_pb2.Model()
    spec.ParseFromString(file.read_bytes())
    block = spec.mlProgram.functions["main"].block_specializations["CoreML8"]
    block.operations[1].inputs["x"].arguments[0].name = "elsewhere"
    file.write_bytes(spec.SerializeToString())
    with pytest.raises(SourceError, match="elsewhere"):
        placement(path)


def test_elsewhere_than_on_a_mac_a_measurement_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(MissingToolError, match="Apple's systems only"):
        measured(tmp_path / "model.mlpackage")


class MLCPUComputeDevice:
    """Named as coremltools' class, by which a device is known."""


class MLNeuralEngineComputeDevice:
    """The same."""


class FakePlan:
    """Answers as coremltools' `MLComputePlan`, from the classes of its own model structure."""

    def __init__(self, operations: list[tuple[str, str]]) -> None:
        made = [
            compute_plan.MLModelStructureProgramOperation(
                {}, operator, [compute_plan.MLModelStructureProgramNamedValueType(name, SimpleNamespace())], [], None
            )
            for name, operator in operations
        ]
        block = compute_plan.MLModelStructureProgramBlock([], made, [])
        program = compute_plan.MLModelStructureProgram({"main": compute_plan.MLModelStructureProgramFunction([], block)})
        self.model_structure = compute_plan.MLModelStructure(None, program, None)

    def get_compute_device_usage_for_mlprogram_operation(self, operation: Any) -> Any:
        cpu, engine = MLCPUComputeDevice(), MLNeuralEngineComputeDevice()
        if operation.operator_name == "const":
            return None
        if operation.operator_name.endswith("topk"):
            return compute_plan.MLComputePlanDeviceUsage(cpu, [cpu])
        return compute_plan.MLComputePlanDeviceUsage(engine, [cpu, engine])


def test_a_plan_of_core_ml_fills_in_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, lambda x: mb.topk(x=mb.relu(x=x, name="r"), k=4, axis=-1, name="t"))
    plan = FakePlan([("c", "const"), ("r", "ios16.relu"), ("t_0", "ios17.topk")])
    asked: list[tuple[str, str]] = []

    def compile_model(model: str, destination_path: str) -> str:
        asked.append((model, Path(destination_path).name))
        return destination_path

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ct.utils, "compile_model", compile_model)
    monkeypatch.setattr(compute_plan.MLComputePlan, "load_from_path", lambda compiled: plan)
    found = measured(path)
    assert asked == [(str(path), "model.mlmodelc")]
    assert [(item.operation, item.operator, item.preferred, item.supported) for item in found.devices] == [
        ("r", "relu", "Neural Engine", ("CPU", "Neural Engine")),
        ("t_0", "topk", "CPU", ("CPU",)),
    ]
    assert found == with_plan(placement(path), plan)
    assert "Core ML's plan" in text(placement_table(found))


def text(renderable: Any) -> str:
    screen = Console(width=200, file=io.StringIO(), record=True)
    screen.print(renderable)
    return screen.export_text()


def test_the_table_joins_findings_that_say_the_same(tmp_path: Path) -> None:
    places = [{"where": f"op{n}", "operator": "exp", "what": RISK, "why": "overflows [x]", "source": "https://a.b"} for n in range(5)]
    shown = text(findings_table(places))
    assert "op0, op1, op2 and 2 more" in shown
    assert "overflows [x] [1]" in shown
    assert "[1] https://a.b" in shown
    assert "nothing was found" in text(findings_table([]))


@pytest.mark.parametrize("as_json", [False, True])
def test_inspect_shows_a_package(as_json: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[Any] = []
    monkeypatch.setitem(targets._local, CoreMl.name, CoreMl)
    # another process would take longer to start than all the rest here
    monkeypatch.setattr("edgekit.evaluate.in_worker", lambda worker, stage, function, *arguments: function(*arguments))
    # the real ones redirect and close the standard output of the process
    monkeypatch.setattr(Session, "reserve_output", lambda session: None)
    monkeypatch.setattr(Session, "write_json", lambda session, value: printed.append(json.loads(json.dumps(value))))
    path = saved(tmp_path, lambda x: mb.exp(x=conv(x, 3, 3)))
    done = CliRunner().invoke(app, ["inspect", str(path), *(["--json"] if as_json else [])])
    assert done.exit_code == 0, done.output
    if as_json:
        assert printed == [{"file": str(path), **placement(path).describe()}]
        assert [item["operator"] for item in printed[0]["findings"]] == ["exp"]
    else:
        assert "operators" in done.output
        assert "float16 risk" in done.output


def test_a_target_tells_nothing_of_files_unless_it_can(tmp_path: Path) -> None:
    assert Target.describe_file(tmp_path) == {}
