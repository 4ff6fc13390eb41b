"""Opens a `.mlpackage` that anybody wrote: its model description, its MIL program and the folder of its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.errors import SourceError, UnsupportedOpError

NEWEST_SPECIFICATION = 9
"""The newest Core ML specification whose operators the evaluator knows: that of iOS18 and macOS15."""
COPY_AGAIN = "copy the whole .mlpackage folder again"


@dataclass(frozen=True)
class Package:
    """An open package.

    Attributes:
        path: The `.mlpackage` folder.
        spec: Its `Model.proto` message, with an ML Program inside.
        weights: The folder that the program calls `@model_path`.
        file: Name of the message's file in that folder.
    """

    path: Path
    spec: Any
    weights: Path
    file: str

    @property
    def functions(self) -> list[str]:
        """Names of the program's functions."""
        return sorted(self.spec.mlProgram.functions)


def open_package(path: str | Path) -> Package:
    """Opens the `.mlpackage` folder `path`.

    Raises:
        SourceError: There is none, it is cut short, or it is of a newer specification than the evaluator knows.
        UnsupportedOpError: The model is no ML Program (a neural network, a pipeline, a tree …).
    """
    path = Path(path)
    file = _model_file(path)
    from coremltools.proto import Model_pb2
    from google.protobuf.message import DecodeError

    spec = Model_pb2.Model()
    try:
        spec.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise SourceError("the package's model file is cut short or damaged", where=str(file), fix=COPY_AGAIN) from error
    version = spec.specificationVersion
    if version > NEWEST_SPECIFICATION:
        raise SourceError(
            f"the package is of Core ML specification {version}; edgekit knows those up to {NEWEST_SPECIFICATION} (iOS18, macOS15)",
            where=str(path),
            fix="save it for a minimum deployment target of iOS18 or older",
        )
    kind = spec.WhichOneof("Type")
    if kind is None:
        raise SourceError("the package's model file holds no model: it is cut short or damaged", where=str(file), fix=COPY_AGAIN)
    if kind != "mlProgram":
        raise UnsupportedOpError(
            f"the package holds a model of type '{kind}', not an ML Program",
            where=str(path),
            fix="convert it again with convert_to='mlprogram' (minimum deployment target iOS15 or newer)",
        )
    return Package(path, spec, file.parent, file.name)


def _model_file(path: Path) -> Path:
    """Where the package's manifest says that its root model lies."""
    if not path.exists():
        raise SourceError("there is no such package", where=str(path), fix="check the path")
    if path.is_file():
        raise SourceError(
            "this is a file, not a .mlpackage folder",
            where=str(path),
            fix="unpack it first; a .mlmodel file holds no ML Program: convert the model again to a .mlpackage",
        )
    manifest = path / "Manifest.json"
    try:
        content = json.loads(manifest.read_text("utf-8"))
        item = content["itemInfoEntries"][content["rootModelIdentifier"]]
        file = path / "Data" / str(item["path"])
    except FileNotFoundError as error:
        raise SourceError("the folder is no .mlpackage: it has no Manifest.json", where=str(path), fix=COPY_AGAIN) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError("the package's Manifest.json is damaged", where=str(manifest), fix=COPY_AGAIN) from error
    if not file.resolve().is_relative_to(path.resolve()):
        raise SourceError("the package's Manifest.json names a model outside the package", where=str(manifest), fix=COPY_AGAIN)
    if not file.is_file():
        raise SourceError(f"the package's model file is missing: {item['path']}", where=str(path), fix=COPY_AGAIN)
    return file
