"""Trained weights of the zoo: one safetensors file a model, with what is known about its training in the file's header.

The header is read without loading tensors or importing torch, so that listing the zoo stays cheap.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from edgekit.contracts import ZooModel
from edgekit.errors import SourceError

if TYPE_CHECKING:
    import torch

_HEADER_KEY = "edgekit"


def weights_path(name: str) -> Path:
    """Returns where the weights of the zoo model `name` are kept."""
    return Path(__file__).parent / "weights" / f"{name}.safetensors"


def read_facts(path: Path) -> dict[str, Any]:
    """Returns what the training command noted in the weights file: accuracy, seed, hyperparameters; empty if there is nothing to read."""
    try:
        with safe_open(path, framework="numpy") as file:
            facts: dict[str, Any] = json.loads((file.metadata() or {}).get(_HEADER_KEY, "{}"))
    except (OSError, SafetensorError, json.JSONDecodeError):
        return {}
    return facts


def save(module: torch.nn.Module, path: Path, facts: Mapping[str, Any]) -> None:
    """Writes the parameters and buffers of `module` with `facts` (JSON values) in the header. Equal content gives equal bytes."""
    from safetensors.torch import save as serialize

    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(serialize(tensors, metadata={_HEADER_KEY: json.dumps(facts, sort_keys=True)}))
    partial.replace(path)


def load(module: torch.nn.Module, path: Path) -> None:
    """Fills `module` in place from a weights file.

    Raises:
        SourceError: The file is missing, is not a safetensors file, or its tensors do not fit the module.
    """
    from safetensors.torch import load_file

    retrain = f"restore the file from the repository, or train again: python -m edgekit.models.train {path.stem}"
    if not path.is_file():
        raise SourceError("the trained weights are missing", where=str(path), fix=retrain)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise SourceError(f"the trained weights cannot be read: {error}", where=str(path), fix=retrain) from error
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise SourceError(f"the trained weights do not fit {type(module).__name__}: {error}", where=str(path), fix=retrain) from error


def zoo_model(
    name: str,
    network: Callable[[], torch.nn.Module],
    *,
    input_shape: tuple[int, ...],
    dataset: str,
    source: str,
    parameters: int | None = None,
    macs: int | None = None,
) -> ZooModel:
    """Returns the zoo's entry of a trained network.

    Args:
        name: Name of the model and of its weights file.
        network: Makes the module with its initial weights; imports torch only when called.
        input_shape: Shape of the one input, batch axis first.
        dataset: Name of the dataset that it was trained on.
        source: Paper that describes it.
        parameters: Its parameters, so that listing the zoo does not trace it.
        macs: Multiply-accumulates of one inference.

    The accuracy is the one that the training command measured and wrote into the weights file, None without one.
    """
    path = weights_path(name)

    def build() -> torch.nn.Module:
        import torch

        with torch.random.fork_rng(devices=[]):  # the initial weights are thrown away: the caller's random state stays
            module = network()
        load(module, path)
        return module.eval()

    accuracy = read_facts(path).get("accuracy")
    return ZooModel(
        name=name, build=build, input_shape=input_shape, dataset=dataset, accuracy=accuracy, source=source, parameters=parameters, macs=macs
    )
