"""The commands. Every heavy import is inside a command, so that `edgekit --help` answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgekit.cli.session import Session
from edgekit.cli.working import reporting, working
from edgekit.errors import EdgekitError, UsageError

if TYPE_CHECKING:
    from edgekit.cli.listing import Listing
    from edgekit.recipe import Recipe

EXIT_CODES = """
Exit codes: 0 ok · 1 a bug of edgekit · 2 usage (options, recipe, data, output folder) · 3 source or trace failed ·
4 unsupported operator, or the target's compiler failed · 5 parity broken · 6 accuracy budget missed · 7 device ·
8 a needed tool is missing · 130 interrupted
"""

app = typer.Typer(
    name="edgekit",
    help="Compile neural networks for phones and small boards, with passes that are checked at every step.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _reserve_output(context: typer.Context, wanted: bool) -> bool:
    if wanted:
        context.ensure_object(Session).reserve_output()
    return wanted


def _tell_more(context: typer.Context, wanted: bool) -> bool:
    if wanted:
        context.ensure_object(Session).verbose = True
    return wanted


Json = Annotated[bool, typer.Option("--json", callback=_reserve_output, help="Print JSON on standard output, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        callback=_tell_more,
        help="Print parity and operators at each stage, and what was left alone and why; with errors, the traceback.",
    ),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        "-i",
        help="Shape of an input: x:1,3,224,224 or x[1,3,224,224]:float32; sizes 1..8 or 224|256 where the target takes several.",
    ),
]
Skip = Annotated[list[str] | None, typer.Option(help="A place that a pass leaves alone, PASS:PLACE; repeat for more.")]
Weights = Annotated[str | None, typer.Option(help="A .safetensors file or state dict to load into the module.")]


def _version(wanted: bool) -> None:
    if wanted:
        from edgekit import __version__

        typer.echo(f"edgekit {__version__}")
        raise typer.Exit


@app.callback()
def _main(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    pass


@app.command("compile")
def compile_command(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Zoo name, timm:NAME, FILE.onnx, FILE.pt2, or package.module:factory.")] = None,
    target: Annotated[str | None, typer.Option("--target", "-t", help="Where to: see `edgekit targets`.")] = None,
    passes: Annotated[
        list[str] | None, typer.Option("--pass", "-p", help="A pass, name{option=value}; repeat for more. Default: the exact ones.")
    ] = None,
    no_passes: Annotated[bool, typer.Option("--no-passes", help="Run no pass at all.")] = False,
    recipe: Annotated[Path | None, typer.Option(help="A recipe.toml; options given beside it win.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Dataset name, folder of images, FILE.npz, or package.module:iterable. Default: noise.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16, as the target offers. Default: the target's own.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write. Default: NAME-TARGET.edgekit")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier artifact at --out.")] = False,
    inputs: Inputs = None,
    weights: Weights = None,
    image_inputs: Annotated[
        list[str] | None,
        typer.Option("--image-input", help="Core ML: an input of images, NAME:SCALE,BIAS,COLOUR; repeatable."),
    ] = None,
    calibration: Annotated[int | None, typer.Option(help="Number of calibration inputs. Default: 8; 256 with --recover.")] = None,
    max_drop: Annotated[float | None, typer.Option(help="Most that approximate passes may cost, in percentage points.")] = None,
    recover: Annotated[
        float | None, typer.Option(help="Minutes to win back what approximate passes cost, by training towards the uncompressed graph.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Take up a --recover that was killed.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of every random choice. Default: 0.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads that the target runs on. Default: all.")] = None,
    skip: Skip = None,
    seconds: Annotated[float, typer.Option(help="Seconds to measure latency for; 0: do not.", min=0.0)] = 10.0,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compile a model: trace, rewrite, check, lower, measure."""
    from edgekit.compiler import RECOVERY_INPUTS, Job, Timing, run_job

    given = {
        "model": model,
        "target": target,
        "passes": () if no_passes else tuple(passes) if passes else None,
        "data": data,
        "precision": precision,
        "inputs": tuple(inputs) if inputs else None,
        "weights": weights,
        "calibration": RECOVERY_INPUTS if calibration is None and recover is not None else calibration,
        "max_drop": max_drop,
        "recover": recover,
        "seed": seed,
        "threads": threads,
        "skip": _skips(skip),
    }
    full = _recipe(recipe, {key: value for key, value in given.items() if value is not None})
    if image_inputs:
        full = _with_target_option(full, "image_inputs", image_inputs)
    folder = out or Path(f"{_short_name(full.model)}-{full.target.partition('{')[0]}.edgekit")
    with reporting(quiet or as_json) as reporter:
        artifact = run_job(Job(full, timing=Timing(budget_s=seconds), resume=resume), folder, force=force, reporter=reporter)
    if as_json:
        _print_json(context, artifact.report)
    elif not quiet:
        from edgekit.cli.show import console, report_table

        screen = console()
        screen.print(report_table(artifact.report, verbose))
        screen.print(f"written to {artifact.path}", highlight=False, markup=False)


def _recipe(path: Path | None, given: dict[str, Any], command: str = "edgekit compile") -> Recipe:
    import dataclasses

    from edgekit.recipe import Recipe, load_recipe

    if path is not None:
        return dataclasses.replace(load_recipe(path), **given)
    for needed, example in (("model", f"{command} mobileone_digits --target openvino"), ("target", "--target openvino")):
        if needed not in given:
            raise UsageError(f"the {needed} is missing", fix=f"{example}; or --recipe FILE")
    return Recipe(**given)


def _with_target_option(recipe: Recipe, name: str, value: object) -> Recipe:
    import dataclasses

    from edgekit.specs import format_value, split_spec

    target, options = split_spec(recipe.target)
    body = ",".join(f"{key}={format_value(item)}" for key, item in {**options, name: value}.items())
    return dataclasses.replace(recipe, target=f"{target}{{{body}}}")


def _skips(texts: list[str] | None) -> dict[str, tuple[str, ...]] | None:
    from edgekit.recipe import parse_skips

    return parse_skips(texts) if texts else None


def _short_name(model: str) -> str:
    path = Path(model)
    name = path.stem if path.suffix in (".onnx", ".pt2") else model.rpartition(":")[2]
    return "".join(character if character.isalnum() or character in "._-" else "_" for character in name) or "model"


@app.command("bisect")
def bisect_command(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="What compile takes; with OTHER the trusted file A.onnx.")] = None,
    other: Annotated[Path | None, typer.Argument(help="B.onnx, which should compute the same as A.onnx.")] = None,
    target: Annotated[str | None, typer.Option("--target", "-t", help="As of compile. Default: the stages before lowering.")] = None,
    passes: Annotated[list[str] | None, typer.Option("--pass", "-p", help="As of compile.")] = None,
    no_passes: Annotated[bool, typer.Option("--no-passes", help="Run no pass at all.")] = False,
    recipe: Annotated[Path | None, typer.Option(help="A recipe.toml; options given beside it win.")] = None,
    data: Annotated[str | None, typer.Option(help="As of compile.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16, as the target offers. Default: the target's own.")] = None,
    inputs: Inputs = None,
    weights: Weights = None,
    calibration: Annotated[int | None, typer.Option(help="Number of calibration inputs. Default: 8.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random choice. Default: 0.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads to run on. Default: all.")] = None,
    skip: Skip = None,
    min_sqnr: Annotated[float | None, typer.Option(help="Least SQNR in dB that is still good. Default: rounding alone.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write a reproducing .onnx with its inputs to.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier reproducer at --out.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Find the pass, rewrite, node and tensor that make numbers differ. Exit code 5: a culprit was found."""
    from edgekit.bisection.run import bisect_files, bisect_job
    from edgekit.compiler import Job

    given = {
        "model": model,
        "target": target,
        "passes": () if no_passes else tuple(passes) if passes else None,
        "data": data,
        "precision": precision,
        "inputs": tuple(inputs) if inputs else None,
        "weights": weights,
        "calibration": calibration,
        "seed": seed,
        "threads": threads,
        "skip": _skips(skip),
    }
    if recipe is None:
        given["target"] = target or ""
    if other is not None and (target or passes or no_passes or recipe or skip):
        raise UsageError("two files are compared as they are: no pass runs and nothing is lowered", fix="edgekit bisect A.onnx B.onnx")
    job = Job(_recipe(recipe, {key: value for key, value in given.items() if value is not None}, "edgekit bisect"))
    with reporting(quiet or as_json) as reporter:
        if other is None:
            finding = bisect_job(job, min_sqnr, out, force=force, reporter=reporter)
        else:
            finding = bisect_files(job, other, min_sqnr, out, force=force, reporter=reporter)
    if as_json:
        _print_json(context, finding.to_dict())
    elif not quiet:
        from edgekit.cli.bisect import finding_tree
        from edgekit.cli.show import console

        console().print(finding_tree(finding))
    if not finding.agree:
        raise typer.Exit(5)


@app.command()
def verify(
    context: typer.Context,
    artifact: Annotated[Path, typer.Argument(help="The folder of a compile, or a .mlpackage that anybody wrote.")],
    against: Annotated[str | None, typer.Option(help="The ONNX model that a .mlpackage is held against.")] = None,
    data: Annotated[str | None, typer.Option(help="With --against: as of compile. Default: noise.")] = None,
    inputs: Inputs = None,
    samples: Annotated[int, typer.Option(help="With --against: number of inputs.", min=1)] = 8,
    precision: Annotated[str | None, typer.Option(help="With --against: fail beyond the rounding of fp32 or fp16.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Repeat the parity check of an artifact, or hold anybody's .mlpackage against an ONNX model."""
    if against is not None:
        from edgekit.against import verify_against

        with working(quiet or as_json, f"run {artifact.name}"):
            found = verify_against(artifact, against, data=data, inputs=tuple(inputs or ()), samples=samples, precision=precision or "")
        return _show_parity(context, f"{artifact} against {against}", found.to_dict(), as_json, quiet)
    from edgekit.artifact import open_artifact

    opened = open_artifact(artifact)
    with working(quiet or as_json, "run artifact"):
        parity = opened.verify().to_dict()
    _show_parity(context, f"{artifact}: artifact against the original, repeated", parity, as_json, quiet)
    if not as_json and not quiet:
        from edgekit.cli.parity import parity_tables
        from edgekit.cli.show import console

        screen = console()
        screen.print("stored by the compile:", highlight=False)
        screen.print(parity_tables(opened.report))


def _show_parity(context: typer.Context, title: str, parity: dict[str, Any], as_json: bool, quiet: bool) -> None:
    if as_json:
        _print_json(context, parity)
    elif not quiet:
        from edgekit.cli.show import console, rows_table

        rows = [
            [key, "–" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)] for key, value in parity.items()
        ]
        console().print(rows_table(title, ["measure", "value"], rows, (1,)))


@app.command()
def profile(
    context: typer.Context,
    artifact: Annotated[Path, typer.Argument(help="The folder of a compile.")],
    seconds: Annotated[float, typer.Option(help="Seconds to measure for.", min=0.1)] = 10.0,
    runs: Annotated[int, typer.Option(help="Runs at most of each side.", min=1)] = 1000,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Time an artifact beside its uncompressed baseline, the two in turn."""
    from edgekit.artifact import open_artifact

    with reporting(quiet or as_json) as reporter:
        reporter.expect(1)
        with reporter.stage("latency", seconds):
            latency = open_artifact(artifact).profile(budget_s=seconds, max_runs=runs)
    if as_json:
        _print_json(context, latency)
    elif not quiet:
        from edgekit.cli.show import console, latency_table

        console().print(latency_table(latency))


@app.command()
def inspect(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="Zoo name, timm:NAME, FILE.onnx, FILE.pt2, package.module:factory, an artifact's folder, or X.mlpackage.")
    ],
    inputs: Inputs = None,
    weights: Weights = None,
    top: Annotated[int, typer.Option(help="How many of the largest layers to show.", min=1)] = 10,
    stage: Annotated[
        str | None, typer.Option(help="Show the whole graph at this stage: canonical, the name of a pass, or lowered.")
    ] = None,
    passes: Annotated[
        list[str] | None, typer.Option("--pass", "-p", help="With --stage: a pass, name{option=value}; as of compile.")
    ] = None,
    no_passes: Annotated[bool, typer.Option("--no-passes", help="With --stage: run no pass at all.")] = False,
    target: Annotated[str | None, typer.Option("--target", "-t", help="With --stage: where to, for lowered.")] = None,
    data: Annotated[str | None, typer.Option(help="With --stage: the data that passes calibrate on, as of compile.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="With --stage: write the graph to this .onnx file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file at --out.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show a model's operators, parameters, MACs, bytes and largest layers; with --stage every node of its graph there."""
    if stage is None:
        if passes or no_passes or target or data or out:
            raise UsageError(
                "--pass, --no-passes, --target, --data and --out belong to a stage", fix="add --stage canonical, PASS or lowered"
            )
        from edgekit.cli.inspect import inspect_model, inspection_table
        from edgekit.cli.placement import described_file, description_table

        with working(quiet or as_json, "inspect"):
            described = described_file(model)
            found = described or inspect_model(model, inputs or [], weights, top)
        _show(context, found, description_table if described else inspection_table, as_json, quiet)
        return
    from edgekit.cli.stage import inspect_stage, stage_table
    from edgekit.recipe import Recipe

    chosen = () if no_passes else tuple(passes) if passes else None
    recipe = Recipe(model, target or "", passes=chosen, data=data, inputs=tuple(inputs or ()), weights=weights)
    with working(quiet or as_json, f"graph at {stage}"):
        found = inspect_stage(recipe, stage, out, force)
    _show(context, found, stage_table, as_json, quiet)


@app.command()
def diff(
    context: typer.Context,
    first: Annotated[str, typer.Argument(metavar="A", help="A model as of inspect, or an artifact's folder.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Likewise.")],
    depth: Annotated[
        int | None, typer.Option(help="Parts of a module's path that count: 2 makes one row of all in blocks.0.", min=1)
    ] = None,
    inputs: Inputs = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show which operators went and came from A to B, by module: networks in canonical form, .onnx files and artifacts as they are."""
    from edgekit.cli.diff import diff_sources, diff_table

    with working(quiet or as_json, "diff"):
        found = diff_sources(first, second, inputs or [], depth)
    _show(context, found, diff_table, as_json, quiet)


@app.command("passes")
def passes_command(context: typer.Context, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """List the passes with each option's type and default."""
    from edgekit.cli.listing import list_passes, passes_table

    _show_list(context, list_passes(), passes_table, as_json, quiet)


@app.command("targets")
def targets_command(context: typer.Context, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """List the targets, their precisions, and whether what they need is installed."""
    from edgekit.cli.listing import list_targets, targets_table

    _show_list(context, list_targets(), targets_table, as_json, quiet)


@app.command("models")
def models_command(context: typer.Context, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """List the zoo with parameters, MACs and accuracy."""
    from edgekit.cli.listing import list_models, models_table

    with reporting(quiet or as_json) as reporter:
        models = list_models(reporter)
    _show_list(context, models, models_table, as_json, quiet)


@app.command()
def doctor(context: typer.Context, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Say what is installed, what is missing, and the command that mends it."""
    from edgekit.cli.doctor import doctor_table, examine

    found = examine()
    _show(context, found, doctor_table, as_json, quiet)
    if any(item["required"] and not item["ok"] for item in found):
        raise typer.Exit(8)


def _show_list(context: typer.Context, listing: Listing, table: Any, as_json: bool, quiet: bool) -> None:
    for error in () if quiet else listing.errors:
        sys.stderr.write(f"warning: {error}\n")
    _show(context, listing.found, table, as_json, quiet)


def _show(context: typer.Context, found: list[dict[str, Any]] | dict[str, Any], table: Any, as_json: bool, quiet: bool) -> None:
    if as_json:
        _print_json(context, found)
    elif not quiet:
        from edgekit.cli.show import console

        console().print(table(found))


def _print_json(context: typer.Context, value: Any) -> None:
    context.ensure_object(Session).write_json(value)


def main() -> None:
    """Runs the command line; every error that bad input can cause ends in a message and an exit code of its own."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in `edgekit.isolation`; read when PyTorch is imported
    session = Session()
    try:
        app(obj=session)  # exits by itself: 0, 2 on a wrong command line, 130 when interrupted
    except EdgekitError as error:
        sys.exit(_fail(str(error), error.exit_code, session.verbose))
    except Exception as error:
        message = f"{type(error).__name__}: {error}\n  this is a bug of edgekit: please report it with the output of -v"
        sys.exit(_fail(message, 1, session.verbose))


def _fail(message: str, code: int, verbose: bool) -> int:
    if verbose:
        import traceback

        traceback.print_exc()
    sys.stderr.write(f"error: {message}\n")
    return code
