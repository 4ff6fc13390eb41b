"""Several models in one package, as functions that share their equal weights (iOS18)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from edgekit.errors import LoweringError, UsageError
from edgekit.targets.coreml.reference.package import open_package


def combine(packages: Mapping[str, str | Path], out: str | Path, default: str | None = None) -> Path:
    """Writes one `.mlpackage` whose functions are the `main` functions of others; weights that are equal are stored once.

    Args:
        packages: By the name of the new function, the package that it comes from.
        out: The package to write; it must not exist.
        default: The function that runs when none is named; None: the first.

    Raises:
        UsageError: There is nothing to combine, `out` exists, or `default` is none of the functions.
        SourceError, UnsupportedOpError: A package cannot be read.
        LoweringError: coremltools cannot combine them.
    """
    import coremltools as ct

    out, default = Path(out), default or next(iter(packages), None)
    if default not in packages:
        raise UsageError(f"there is no function '{default}' to run by default", fix=f"one of: {', '.join(packages) or '(none given)'}")
    if out.exists():
        raise UsageError("the package exists", where=str(out), fix="give a name that does not exist")
    description = ct.utils.MultiFunctionDescriptor()
    for name, path in packages.items():
        open_package(path)
        description.add_function(str(path), src_function_name="main", target_function_name=name)
    description.default_function_name = default
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".combine-") as folder:
        whole = Path(folder) / out.name
        try:
            ct.utils.save_multifunction(description, str(whole))
        except Exception as error:  # coremltools raises errors of every kind
            raise LoweringError(
                f"coremltools cannot combine the packages: {str(error).strip()[:300]}", where=str(out), fix="check that each runs by itself"
            ) from error
        whole.rename(out)
    return out
