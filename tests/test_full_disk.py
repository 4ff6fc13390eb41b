"""A disk that fills up during a compile: an error that says so, whatever was being written and by whom."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgekit.compiler import Job, Timing, run_job
from edgekit.errors import OutputError
from edgekit.isolation import Worker
from edgekit.progress import Reporter
from edgekit.recipe import Recipe
from tests.conftest import edgekit, listing, tiny_model

TARGETS = ["onnxruntime", "openvino"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 800 kB."""
    model = tiny_model()
    weight = np.random.default_rng(0).normal(0, 1, (4, 50_000)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "wide"))
    model.graph.node.append(helper.make_node("MatMul", ["logits", "wide"], ["scores"]))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, [1, 50_000]))
    path = tmp_path_factory.mktemp("wide") / "wide.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many kilobytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(kilobytes: int) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "edgekit-test", folder], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip(f"no file system may be mounted here, so a full disk was NOT tested: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for place in mounted:
        subprocess.run(["umount", place], check=True)


def compile_to(folder: Path, model: Path, target: str, worker: Worker, force: bool = False) -> None:
    job = Job(Recipe(str(model), target, calibration=2, threads=1), timing=Timing(0.2))
    run_job(job, folder / "out", force=force, reporter=Reporter(), worker=worker)


# In kilobytes, the room for: the first file, the copy that is lowered, the lowered one, the baseline.
@pytest.mark.parametrize("kilobytes", [100, 600, 1000, 1600, 2000, 2400])
@pytest.mark.parametrize("target", TARGETS)
def test_a_full_disk(target: str, kilobytes: int, wide: Path, small_disk: Callable[[int], Path], worker: Worker) -> None:
    folder = small_disk(kilobytes)
    with pytest.raises(OutputError, match="the disk is full") as caught:
        compile_to(folder, wide, target, worker)
    assert caught.value.exit_code == 2
    assert caught.value.fix
    assert "--out" in caught.value.fix
    assert listing(folder) == []


@pytest.mark.parametrize("target", TARGETS)
def test_a_full_disk_keeps_the_earlier_artifact(
    target: str, tiny: Path, wide: Path, small_disk: Callable[[int], Path], worker: Worker
) -> None:
    folder = small_disk(1200)
    compile_to(folder, tiny, target, worker)
    before = listing(folder)
    with pytest.raises(OutputError, match="the disk is full"):
        compile_to(folder, wide, target, worker, force=True)
    assert listing(folder) == before


@pytest.mark.parametrize("limit", [100_000, 805_000])
def test_a_file_that_may_not_grow(limit: int, wide: Path, tmp_path: Path) -> None:
    arguments = ("compile", str(wide), "--target", "onnxruntime", "--out", "out", "--seconds", "0", "--quiet")
    done = edgekit(*arguments, cwd=tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 2, done.stderr
    assert "disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert listing(tmp_path) == []
