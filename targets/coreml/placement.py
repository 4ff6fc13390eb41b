"""What runs where: which operations of a package are documented or reported to leave the Neural Engine, and which are at risk in float16.

Core ML alone decides where an operation runs, on the device. `placement` reads a package on any system and applies `placement_rules`;
`measured` asks Core ML on a Mac.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgekit.errors import LoweringError, MissingToolError, SourceError
from edgekit.targets.coreml.placement_program import Operation, operations
from edgekit.targets.coreml.placement_rules import COPY, LEAVES, RISK, RULES, Kind
from edgekit.targets.coreml.reference.package import open_package

DEVICES = {"MLCPUComputeDevice": "CPU", "MLGPUComputeDevice": "GPU", "MLNeuralEngineComputeDevice": "Neural Engine"}
"""By coremltools' names of the classes."""


@dataclass(frozen=True)
class Finding:
    """One claim about one operation.

    Attributes:
        operation: Its name.
        operator: MIL's name of its operator.
        reason: Why.
        source: Where the claim stands: an address, or the title of a document.
        kind: "leaves the Neural Engine", "float16 risk" or "layout copy".
    """

    operation: str
    operator: str
    reason: str
    source: str
    kind: Kind


@dataclass(frozen=True)
class Device:
    """Where Core ML would run an operation: "CPU", "GPU" or "Neural Engine".

    Attributes:
        operation: Its name.
        operator: MIL's name of its operator.
        preferred: Where Core ML means to run it.
        supported: Where it could run.
    """

    operation: str
    operator: str
    preferred: str
    supported: tuple[str, ...]


@dataclass(frozen=True)
class Placement:
    """What is known of where a package runs.

    Attributes:
        path: The package.
        operators: How often each operator is used, constants left out.
        findings: In the order of the program.
        totals: `operations` in all, and on how many operations there are findings of each kind.
        devices: Core ML's own plan; empty unless it was asked for on a Mac.
    """

    path: str
    operators: dict[str, int]
    findings: tuple[Finding, ...]
    totals: dict[str, int]
    devices: tuple[Device, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return asdict(self)

    def describe(self) -> dict[str, Any]:
        """As `Target.describe_file` gives it."""
        places = [
            {"where": item.operation, "operator": item.operator, "what": item.kind, "why": item.reason, "source": item.source}
            for item in self.findings
        ]
        return {"operators": self.operators, "findings": places, "facts": dict(self.totals)}


def placement(path: str | Path) -> Placement:
    """Applies the rules to a saved `.mlpackage`, anybody's.

    Raises:
        SourceError: It cannot be read.
        UnsupportedOpError: It holds no ML Program.
    """
    counts: Counter[str] = Counter()
    findings: list[Finding] = []
    for operation in operations(open_package(path)):
        counts[operation.operator] += 1
        if not operation.operator.startswith("constexpr_"):  # weights, which Core ML expands when it loads the model
            findings += _findings(operation)
    totals = {"operations": counts.total()}
    totals |= {kind: len({item.operation for item in findings if item.kind == kind}) for kind in (LEAVES, COPY, RISK)}
    return Placement(str(path), dict(counts.most_common()), tuple(findings), totals)


def _findings(operation: Operation) -> Iterator[Finding]:
    for rule in RULES:
        if rule.operators and operation.operator not in rule.operators.split():
            continue
        try:
            reason = rule.check(operation)
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise SourceError(
                f"the arguments of the {operation.operator} do not fit together: {error}",
                where=f"operation '{operation.name}'",
                fix="the package is damaged: write it again",
            ) from error
        if reason is not None:
            yield Finding(operation.name, operation.operator, reason, rule.source, rule.kind)


def measured(path: str | Path) -> Placement:
    """`placement` with the plan that Core ML makes for this Mac.

    Raises:
        MissingToolError: This is no Mac, or its coremltools lacks Core ML's bindings.
        SourceError, UnsupportedOpError: As of `placement`.
        LoweringError: Core ML cannot compile the package.
    """
    if sys.platform != "darwin":
        raise MissingToolError(
            "where operations run is Core ML's own decision, and Core ML runs on Apple's systems only",
            where=str(path),
            fix="run this on a Mac with macOS 14.4 or newer; placement() reports what is known without one",
        )
    found = placement(path)
    import coremltools as ct
    from coremltools.models.compute_plan import MLComputePlan

    with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
        try:
            compiled = ct.utils.compile_model(str(path), f"{folder}/model.mlmodelc")
            return with_plan(found, MLComputePlan.load_from_path(compiled))
        except ValueError as error:  # what coremltools raises without its native library
            raise MissingToolError(
                f"coremltools cannot ask Core ML for its plan: {error}", fix="pip install --upgrade coremltools"
            ) from error
        except RuntimeError as error:
            raise LoweringError(f"Core ML cannot compile the package: {str(error).strip()[:400]}", where=str(path)) from error


def with_plan(found: Placement, plan: Any) -> Placement:
    """Fills in `devices` from an `MLComputePlan`; operations of which the plan tells nothing are left out."""
    functions: Mapping[str, Any] = plan.model_structure.program.functions
    devices = []
    for name in sorted(functions):
        prefix = f"{name}/" if len(functions) > 1 else ""
        for operation in _planned(functions[name].block):
            usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
            if usage is None or not operation.outputs:
                continue
            supported = tuple(_device(device) for device in usage.supported_compute_devices)
            operator = operation.operator_name.rpartition(".")[2]  # Core ML puts the opset before it: ios16.conv
            devices.append(Device(f"{prefix}{operation.outputs[0].name}", operator, _device(usage.preferred_compute_device), supported))
    return replace(found, devices=tuple(devices))


def _planned(block: Any) -> Iterator[Any]:
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from _planned(inner)


def _device(device: object) -> str:
    name = type(device).__name__
    return DEVICES.get(name, name)
