"""Several functions in one package: each runs, weights that are equal are stored once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgekit.errors import SourceError, UsageError
from edgekit.targets.coreml import predict
from edgekit.targets.coreml.multifunction import combine
from edgekit.targets.coreml.reference.evaluator import Evaluator
from tests.targets.coreml.packages import conv_package


def test_two_functions_share_their_weights(tmp_path: Path) -> None:
    package = conv_package(tmp_path / "net.mlpackage")
    x = {"x": np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)}
    out = combine({"first": package, "second": package}, tmp_path / "both.mlpackage", default="second")
    assert Evaluator(out).name == "second"
    for name in ("first", "second", None):
        np.testing.assert_array_equal(predict(out, x, function=name)["y"], predict(package, x)["y"])
    sizes = [sum(file.stat().st_size for file in path.rglob("*.bin")) for path in (package, out)]
    assert sizes[1] < 1.5 * sizes[0]


def test_mistakes(tmp_path: Path) -> None:
    package = conv_package(tmp_path / "net.mlpackage")
    with pytest.raises(UsageError, match="exists"):
        combine({"first": package}, package)
    with pytest.raises(UsageError, match="no function 'third'"):
        combine({"first": package}, tmp_path / "both.mlpackage", default="third")
    with pytest.raises(UsageError, match="no function"):
        combine({}, tmp_path / "both.mlpackage")
    with pytest.raises(SourceError, match="no such package"):
        combine({"first": tmp_path / "none.mlpackage"}, tmp_path / "both.mlpackage")
    assert not (tmp_path / "both.mlpackage").exists()
