"""Specification strings of passes and targets: `prune-tokens{keep=[0.9,0.7,0.5],method="evit"}`.

The part in braces is a TOML inline table whose keys are the fields of the frozen dataclass that the name stands for,
so that the command line, a recipe file and Python declare an option once.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from edgekit import contracts
from edgekit.contracts import Pass
from edgekit.errors import RecipeError, nearest

T = TypeVar("T")

_SPEC = re.compile(r"\s*(?P<name>[A-Za-z0-9][A-Za-z0-9_.-]*)\s*(?:\{(?P<options>.*)\})?\s*", re.DOTALL)


def split_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Splits a specification into its name and its options as TOML values.

    Raises:
        RecipeError: The string is not of the form `name` or `name{option=value,...}`.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise RecipeError(f"'{spec}' is not a specification", fix='write name{option=value,other=[1,2],text="quoted"}')
    name, body = match["name"], match["options"]
    if body is None:
        return name, {}
    try:
        table = tomllib.loads(f"options = {{{body}}}")
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(
            f"the options of '{spec}' cannot be read: {error}",
            fix='put lists in brackets and strings in quotes: name{keep=[0.9,0.7],method="evit"}',
        ) from error
    if set(table) != {"options"}:
        raise RecipeError(f"'{spec}' holds more than one table of options", fix="give each specification by itself")
    return name, table["options"]


def make(cls: type[T], options: Mapping[str, Any], label: str) -> T:
    """Makes an instance of the dataclass `cls` from options given as TOML values.

    Args:
        cls: A dataclass with annotated fields.
        options: Values by field name.
        label: What the instance is called in messages, such as `pass 'to-float16'`.

    Raises:
        RecipeError: An option does not exist or is of the wrong type.
    """
    hints = get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    values = {}
    for key, value in options.items():
        if key not in known:
            raise RecipeError(f"{label} has no option '{key}'", fix=nearest(key, known))
        try:
            values[key] = _coerce(value, hints[key])
        except TypeError as error:
            raise RecipeError(
                f"option '{key}' of {label} takes {type_name(hints[key])}, not {format_value(value)}",
                fix="see `edgekit passes` for each option's type and default",
            ) from error
    required = [
        field.name
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing := [key for key in required if key not in values]:
        raise RecipeError(f"{label} needs the option {', '.join(missing)}", fix="give it in braces: name{option=value}")
    return cls(**values)


def make_pass(spec: str) -> Pass:
    """Makes a pass from its specification string.

    Raises:
        RecipeError, UsageError: The pass or one of its options does not exist.
    """
    name, options = split_spec(spec)
    return make(contracts.passes.get(name), options, f"pass '{name}'")


def format_spec(name: str, instance: Any) -> str:
    """Prints the specification that makes `instance` again; options at their default are left out."""
    parts = []
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value != default:
            parts.append(f"{field.name}={format_value(value)}")
    return f"{name}{{{','.join(parts)}}}" if parts else name


def format_value(value: Any) -> str:
    """Prints a value in the TOML form that `split_spec` reads."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON escapes are TOML escapes, except that TOML has no surrogate pairs; DEL must be escaped in TOML.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{','.join(format_value(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{json.dumps(k)}={format_value(v)}' for k, v in value.items())}}}"
    if isinstance(value, float | int):
        return repr(value)
    return str(value)


def type_name(annotation: Any) -> str:
    """Names a field's type for people: `a number | list of numbers`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(arg) for arg in args if arg is not type(None))
    if origin is Literal:
        return " | ".join(format_value(arg) for arg in args)
    if origin is tuple:
        return f"list of {_plural(args[0])}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a quoted string"}.get(annotation, str(annotation))


def _plural(annotation: Any) -> str:
    if get_origin(annotation) is tuple:
        return f"lists of {_plural(get_args(annotation)[0])}"
    return {int: "whole numbers", float: "numbers", str: "quoted strings"}.get(annotation, type_name(annotation))


def _coerce(value: Any, annotation: Any) -> Any:
    """Returns `value` as `annotation`; raises TypeError where it does not fit."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        for arg in args:
            try:
                return _coerce(value, arg)
            except TypeError:
                continue
        raise TypeError
    if origin is Literal:
        if any(value == arg and type(value) is type(arg) for arg in args):
            return value
        raise TypeError
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        if isinstance(value, list | tuple):
            return tuple(_coerce(item, args[0]) for item in value)
        raise TypeError
    if annotation is float and type(value) in (int, float):
        return float(value)
    if annotation in (bool, int, str) and type(value) is annotation:
        return value
    raise TypeError
