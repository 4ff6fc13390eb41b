"""Applying one pass: whatever else it raises becomes an error that names it."""

from __future__ import annotations

import onnx_ir as ir

from edgekit.contracts import Context, Pass
from edgekit.errors import EdgekitError, PassError


def apply_pass(item: Pass, spec: str, model: ir.Model, context: Context) -> int:
    """Applies a pass; whatever else it raises becomes an error that names it.

    Raises:
        PassError: It raised something that is no error of edgekit.
    """
    try:
        return item.apply(model, context)
    except EdgekitError:
        raise
    except (Exception, SystemExit) as error:  # a pass may be anybody's code
        raise PassError(
            f"pass '{spec}' failed: {type(error).__name__}: {error}",
            where=f"{type(item).__module__}.{type(item).__qualname__}",
            fix="leave the pass out, or correct it; -v prints the whole error",
        ) from error
