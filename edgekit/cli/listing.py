"""What there is: passes, targets and zoo models, as plain data and as tables."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_type_hints

from rich.console import Group, RenderableType
from rich.text import Text

from edgekit import contracts, specs
from edgekit.cli.show import count, rows_table
from edgekit.errors import EdgekitError
from edgekit.machine import install_command, version
from edgekit.progress import Reporter


@dataclasses.dataclass(frozen=True)
class Listing:
    """What there is.

    Attributes:
        found: One dictionary a thing.
        errors: Why others cannot be used; one broken package must not hide the rest.
    """

    found: list[dict[str, Any]]
    errors: list[EdgekitError]


def _summary(thing: object) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0] if thing.__doc__ else ""


def _options(cls: type[Any]) -> list[dict[str, str]]:
    hints = get_type_hints(cls)
    options = []
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            default = specs.format_value(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            default = specs.format_value(field.default_factory())
        else:
            default = "must be given"
        options.append({"name": field.name, "type": specs.type_name(hints[field.name]), "default": default})
    return options


def list_passes() -> Listing:
    """Every pass with its effect, its options, and whether it belongs to the default recipe."""
    passes, errors = contracts.passes.load_all()
    found = [
        {
            "name": name,
            "effect": cls.effect.value,
            "default": cls.default_order is not None,
            "summary": _summary(cls),
            "options": _options(cls),
        }
        for name, cls in passes.items()
    ]
    return Listing(found, [*errors])


def passes_table(found: list[dict[str, Any]]) -> RenderableType:
    """The passes, one paragraph each."""
    return _paragraphs([(item["name"], item["effect"] + (", by default" if item["default"] else ""), item) for item in found])


def _paragraphs(things: list[tuple[str, str, dict[str, Any]]]) -> RenderableType:
    """Name and state in one line, then the summary and the options with type and default."""
    lines = []
    for name, state, item in things:
        lines += [Text(name, style="bold").append(f"  {state}", style="not bold cyan"), Text(f"    {item['summary']}")]
        lines += [Text(f"    {option['name']} = {option['default']}  ({option['type']})", style="dim") for option in item["options"]]
    return Group(*lines)


def list_targets() -> Listing:
    """Every target with its precisions, its options, and what of its needs is missing."""
    targets, errors = contracts.targets.load_all()
    found = []
    for name, cls in targets.items():
        missing = [package for package in cls.requires if version(package) is None]
        found.append(
            {
                "name": name,
                "precisions": list(cls.precisions),
                "options": [option for option in _options(cls) if option["name"] != "precision"],
                "missing": missing,
                "install": install_command(cls.extra, missing) if missing else None,
                "summary": _summary(cls),
            }
        )
    return Listing(found, [*errors])


def targets_table(found: list[dict[str, Any]]) -> RenderableType:
    """The targets, one paragraph each."""
    return _paragraphs([(item["name"], f"{', '.join(item['precisions'])}; {item['install'] or 'ready'}", item) for item in found])


def list_models(reporter: Reporter) -> Listing:
    """Every zoo model with its parameters, its MACs and its accuracy as measured in training; those that state their cost are not built."""
    from edgekit.cli.inspect import inspect_model

    models, not_imported = contracts.models.load_all()
    found, errors = [], list[EdgekitError](not_imported)
    reporter.expect(sum(model.parameters is None or model.macs is None for model in models.values()))
    for name, model in models.items():
        parameters, macs = model.parameters, model.macs
        if parameters is None or macs is None:
            try:
                with reporter.stage(name):
                    inspected = inspect_model(name, [], None, top=0)
            except EdgekitError as error:
                errors.append(error)
                continue
            parameters, macs = inspected["parameters"], inspected["macs"]
        found.append(
            {
                "name": name,
                "parameters": parameters,
                "macs": macs,
                "input": "×".join(map(str, model.input_shape)),
                "values": math.prod(model.input_shape),
                "dataset": model.dataset,
                "accuracy": model.accuracy,
                "source": model.source,
            }
        )
    return Listing(found, errors)


def models_table(found: list[dict[str, Any]]) -> RenderableType:
    """The zoo as a table, and where each model comes from."""
    rows = [
        [
            item["name"],
            count(item["parameters"]),
            count(item["macs"]),
            item["input"],
            "–" if item["accuracy"] is None else f"{100 * item['accuracy']:.2f} % ({item['dataset']})",
        ]
        for item in found
    ]
    table = rows_table("models", ["name", "parameters", "MACs", "input", "held-out top-1"], rows, right=(1, 2, 4))
    return Group(table, *(Text(f"{item['name']}: {item['source']}", style="dim") for item in found))
