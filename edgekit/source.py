"""From what the user typed to a model: a zoo name, `timm:NAME`, an ONNX file, a `.pt2`, `package.module:factory`, or a module."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import contracts
from edgekit.contracts import ZooModel
from edgekit.errors import EdgekitError, MissingToolError, SourceError, UsageError, nearest
from edgekit.inputs import InputSpec
from edgekit.quiet import muted
from edgekit.specs import split_spec

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch


USER_ERRORS = (Exception, SystemExit)
"""What the user's code raises when it fails; a call of `sys.exit` in it must not end edgekit as if all were done."""


@dataclass
class Source:
    """A model as it came.

    Attributes:
        name: Short name, fit for a file name.
        module: The PyTorch module, or None for an ONNX file.
        program: The exported program of a `.pt2` file; `module` then runs it.
        example_inputs: Positional example inputs of the module.
        model: The graph of an ONNX file, or None.
        image_statistics: Mean and standard deviation per channel that the model expects of images, if known.
        dataset: Name of the dataset that the model was trained on, if known.
        notes: What the report must say about the source.
    """

    name: str
    module: torch.nn.Module | None = None
    program: torch.export.ExportedProgram | None = None
    example_inputs: tuple[torch.Tensor, ...] = ()
    model: ir.Model | None = None
    image_statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    dataset: str | None = None
    notes: list[str] = field(default_factory=list)

    def parameters(self) -> int | None:
        """Number of trained parameters of the module; None for an ONNX file, which does not tell."""
        if self.module is None:
            return None
        return sum(parameter.numel() for parameter in self.module.parameters())


def open_source(model: str, inputs: Sequence[InputSpec] = (), weights: str | None = None, seed: int = 0) -> Source:
    """Opens what the user named.

    Args:
        model: As on the command line.
        inputs: The user's descriptions of inputs.
        weights: A `.safetensors` file or a state dict to load into the module.
        seed: Seed of random weights and example inputs.

    Raises:
        SourceError: There is no such model, or it cannot be read.
        MissingToolError: The model needs a package that is not installed.
    """
    path = Path(model)
    suffix = path.suffix.lower()
    if model.partition("{")[0] in contracts.models.names():
        name, settings = split_spec(model)
        source = _from_zoo(contracts.models.get(name), settings, inputs, seed)
    elif model.startswith("timm:"):
        source = _from_timm(model.removeprefix("timm:"), inputs, seed)
    elif suffix == ".onnx":
        return _from_onnx(path, weights)
    elif suffix == ".pt2":
        source = _from_exported(path, inputs)
    elif suffix in {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".safetensors"}:
        raise SourceError(
            f"'{suffix}' files hold weights without a network, and opening a pickle runs whatever code is in it"
            if suffix != ".safetensors"
            else "a .safetensors file holds weights without a network",
            where=model,
            fix="give the network as package.module:factory and the weights by --weights (.safetensors, or a state dict), "
            "or save it by torch.export.save as .pt2",
        )
    elif ":" in model and not path.exists():
        source = _from_factory(model, inputs, seed)
    elif path.exists():
        raise SourceError("the file's name does not tell what it holds", where=model, fix="known endings: .onnx, .pt2")
    else:
        raise SourceError(
            f"there is no model '{model}'",
            fix=f"{nearest(model, contracts.models.names())}; or timm:NAME, FILE.onnx, FILE.pt2, package.module:factory",
        )
    if weights is not None:
        _load_weights(source, weights)
    return source


def from_module(module: torch.nn.Module, example_inputs: Any, inputs: Sequence[InputSpec] = (), seed: int = 0) -> Source:
    """Wraps a module that was handed over in Python.

    Args:
        module: The module.
        example_inputs: A tensor or array, a sequence of them, or a mapping by argument name; None: made from `inputs`.
        inputs: Descriptions of inputs, used when there are no example inputs.
        seed: Seed of example inputs made from `inputs`.

    Raises:
        SourceError: There are neither example inputs nor descriptions, or they do not fit the module's arguments.
    """
    name = type(module).__name__
    if example_inputs is None:
        return Source(name, module=module, example_inputs=_example_inputs(module, name, inputs, seed))
    return Source(name, module=module, example_inputs=_as_tensors(module, name, example_inputs))


def _from_zoo(zoo: ZooModel, settings: Mapping[str, Any], inputs: Sequence[InputSpec], seed: int) -> Source:
    known = inspect.signature(zoo.build).parameters
    for setting in settings:
        if setting not in known:
            fix = nearest(setting, known) if known else f"give its name alone: {zoo.name}"
            raise UsageError(f"model '{zoo.name}' has no option '{setting}'", fix=fix)
    try:
        module = zoo.build(**settings)
    except EdgekitError:
        raise
    except USER_ERRORS as error:  # a model of the zoo may be anybody's code
        raise SourceError(
            f"the model could not be built: {type(error).__name__}: {error}", where=zoo.name, fix="reinstall the package that provides it"
        ) from error
    if inputs:
        examples = _example_inputs(module, zoo.name, inputs, seed)
    else:
        import torch

        examples = (torch.zeros(zoo.input_shape),)
    return Source(zoo.name, module=module, example_inputs=examples, dataset=zoo.dataset)


def _from_timm(name: str, inputs: Sequence[InputSpec], seed: int) -> Source:
    import torch

    try:
        import timm
    except ModuleNotFoundError as error:
        raise MissingToolError(
            f"timm:{name} needs the package '{error.name}'", fix="pip install -c constraints.txt 'edgekit[timm]'"
        ) from error
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        raise MissingToolError(
            "timm cannot be imported: the installed torchvision lacks its compiled operators, it was built for another torch",
            where=f"torchvision beside torch {torch.__version__}",
            fix="install torch and torchvision of the same release and build (both CPU, or both CUDA)",
        ) from error
    pretrained = "." in name
    if name.split(".")[0] not in timm.list_models():
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=5, cutoff=0.5)  # there are more than a thousand
        fix = f"did you mean one of: {', '.join(close)}?" if close else "timm.list_models() gives their names"
        raise SourceError(f"timm has no model '{name}'", fix=fix)
    torch.manual_seed(seed)
    try:
        module = timm.create_model(name, pretrained=pretrained)
    except Exception as error:  # timm and the hub raise many kinds
        raise SourceError(
            f"timm could not build '{name}': {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            fix="without a weights tag (after the dot) the model is built with random weights; --weights loads a file",
        ) from error
    config = module.pretrained_cfg
    notes = [] if pretrained else [f"timm:{name} has random weights (seed {seed}): name a weights tag or give --weights"]
    if not inputs:
        inputs = [InputSpec("", (1, *config["input_size"]))]
    source = Source(name, module=module, example_inputs=_example_inputs(module, name, inputs, seed), notes=notes)
    if "mean" in config:
        source.image_statistics = (tuple(config["mean"]), tuple(config["std"]))
    return source


def _from_onnx(path: Path, weights: str | None) -> Source:
    from edgekit.onnx_file import read_onnx

    if weights is not None:
        raise UsageError("--weights loads into a PyTorch module; an ONNX file has its own", where=str(path), fix="leave --weights out")
    return Source(path.stem, model=read_onnx(path))


def _from_exported(path: Path, inputs: Sequence[InputSpec]) -> Source:
    import torch

    if not path.is_file():
        raise SourceError("there is no such file", where=str(path), fix="check the path")
    if inputs:
        raise UsageError("a .pt2 file fixes its input shapes", where=str(path), fix="leave --input out, or export it with other shapes")
    try:
        with muted("torch.export"):  # it prints a traceback of what is raised here
            program = torch.export.load(path)
    except Exception as error:  # zip, schema and unpickling errors of many kinds
        raise SourceError(
            f"the file is not a torch.export program: {str(error).splitlines()[0][:200] if str(error) else type(error).__name__}",
            where=str(path),
            fix=f"write it by torch.export.save with torch {torch.__version__.split('+')[0]}",
        ) from error
    if program.example_inputs is None or program.example_inputs[1]:
        raise SourceError(
            "the program carries no positional example inputs", where=str(path), fix="export it with positional example inputs"
        )
    return Source(path.stem, module=program.module(), program=program, example_inputs=tuple(program.example_inputs[0]))


def _from_factory(name: str, inputs: Sequence[InputSpec], seed: int) -> Source:
    import torch

    made = import_object(name, SourceError)
    if callable(made) and not isinstance(made, torch.nn.Module):
        torch.manual_seed(seed)
        try:
            made = made()
        except EdgekitError:
            raise
        except USER_ERRORS as error:
            raise SourceError(
                f"the factory raised {type(error).__name__}: {error}", where=name, fix="it must be callable without arguments"
            ) from error
    examples = None
    if isinstance(made, tuple) and len(made) == 2:
        made, examples = made
    if not isinstance(made, torch.nn.Module):
        raise SourceError(
            f"the factory returned a {type(made).__name__}, not a torch.nn.Module",
            where=name,
            fix="return the module, or the module and its example inputs",
        )
    source = from_module(made, None if inputs else examples, inputs, seed)
    source.name = name.rpartition(":")[2]
    return source


def import_object(name: str, error_class: type[EdgekitError]) -> Any:
    """Imports `package.module:attribute`, with the current folder on the path as `python -m` has it."""
    module_name, _, attribute = name.partition(":")
    if (cwd := os.getcwd()) not in sys.path:
        sys.path.insert(0, cwd)
    try:
        module = importlib.import_module(module_name)
    except USER_ERRORS as error:
        raise error_class(
            f"'{module_name}' cannot be imported: {type(error).__name__}: {error}",
            where=name,
            fix="run from the folder that holds it, or install it",
        ) from error
    if not hasattr(module, attribute):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise error_class(f"'{module_name}' has no '{attribute}'", where=name, fix=nearest(attribute, names))
    return getattr(module, attribute)


def _argument_names(module: torch.nn.Module) -> list[str]:
    parameters = inspect.signature(module.forward).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _in_order(module: torch.nn.Module, where: str, given: dict[str, Any]) -> list[Any]:
    """Puts inputs that are given by argument name into the order of `forward`."""
    arguments = _argument_names(module)
    for name in given:
        if name not in arguments:
            raise SourceError(f"the module has no input '{name}'", where=where, fix=nearest(name, arguments))
    wanted = arguments[: len(given)]
    if set(wanted) != set(given):
        missing = [name for name in wanted if name not in given]
        raise SourceError(f"the module also needs the input {', '.join(missing)}", where=where, fix="describe every input before it too")
    return [given[name] for name in wanted]


def _example_inputs(module: torch.nn.Module, where: str, inputs: Sequence[InputSpec], seed: int) -> tuple[torch.Tensor, ...]:
    import torch

    if not inputs:
        raise SourceError("the shapes of the module's inputs are not known", where=where, fix="give --input x:1,3,224,224")
    arguments = _argument_names(module)
    if any(not spec.name for spec in inputs):
        if len(inputs) != 1 or not arguments:
            raise SourceError("an input without a name is only clear when there is just one", where=where, fix="write name:1,3,224,224")
        inputs = [InputSpec(arguments[0], inputs[0].shape, inputs[0].dtype)]
    specs = _in_order(module, where, {spec.name: spec for spec in inputs})
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for spec in specs:
        dtype: torch.dtype = getattr(torch, spec.dtype or "float32")
        if dtype.is_floating_point:
            tensors.append(torch.randn(spec.shape, generator=generator).to(dtype))
        else:
            tensors.append(torch.randint(0, 2, spec.shape, generator=generator).to(dtype))
    return tuple(tensors)


def _as_tensors(module: torch.nn.Module, where: str, examples: Any) -> tuple[torch.Tensor, ...]:
    import torch

    if isinstance(examples, dict):
        items = _in_order(module, where, examples)
    elif isinstance(examples, tuple | list):
        items = list(examples)
    else:
        items = [examples]
    tensors = []
    for position, item in enumerate(items):
        try:
            tensors.append(torch.as_tensor(item))
        except Exception as error:  # torch raises several kinds for what it cannot convert
            raise SourceError(
                f"example input {position} is a {type(item).__name__}, not a tensor or array", where=where, fix="give tensors"
            ) from error
    return tuple(tensors)


def _load_weights(source: Source, weights: str) -> None:
    import torch

    path = Path(weights)
    if not path.is_file():
        raise SourceError("there is no such weights file", where=weights, fix="check the path")
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated files and refused pickles raise many kinds
        raise SourceError(
            f"the weights cannot be read safely: {str(error).splitlines()[0][:200] if str(error) else type(error).__name__}",
            where=weights,
            fix="save the state dict as .safetensors",
        ) from error
    assert source.module is not None
    try:
        source.module.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise SourceError(
            "the weights do not fit the network: " + " ".join(str(error).split())[:300],
            where=weights,
            fix="check that they belong together",
        ) from error
    source.notes = [note for note in source.notes if "random weights" not in note]
