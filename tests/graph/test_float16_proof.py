"""`prove_float16` against numpy's float16."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgekit.graph.float16_proof import Proof, prove_float16
from edgekit.graph.shapes import infer_shapes


def graph(text: str) -> ir.Model:
    model = ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> {text}'))
    infer_shapes(model)
    return model


def test_error_noise_and_agreement_are_those_of_numpy():
    x = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    x[:10, 1] = x[:10, 0] + np.float32(1e-5) * np.sign(x[:10, 0])  # a difference that float16 does not see
    proof = prove_float16(graph("g (float[40,2] x) => (float[40,2] y) { y = Mul(x, x) }"), [{"x": x}])
    half = x.astype(np.float16)
    exact, rounded = x.astype(np.float64) ** 2, (half.astype(np.float32) ** 2).astype(np.float16).astype(np.float64)
    error = np.abs(rounded - exact)
    assert proof.max_abs_error == pytest.approx(error.max())
    assert proof.sqnr_db == pytest.approx(10 * np.log10((exact**2).sum() / (error**2).sum()))
    agreement = (exact.argmax(1) == rounded.argmax(1)).mean()
    assert proof.top1_agreement == agreement < 1
    assert (proof.samples, proof.lost, proof.overflows) == (40, 0, ())


def test_overflow_inside_a_whole_operator_is_named():
    x = np.float32([[1000, -1000, 500, 0], [1, 2, 3, 4]])
    proof = prove_float16(graph("g (float[2,4] x) => (float[2,4] y) { y = LpNormalization(x) }"), [{"x": x}])
    assert {"y/square", "y/sum_of_squares"} <= set(proof.overflows)
    assert "x" not in proof.overflows


def test_lost_outputs_are_no_small_error():
    proof = prove_float16(graph("g (float[2,2] x) => (float[2,2] y) { y = Mul(x, x) }"), [{"x": np.float32([[300, 1], [1, 2]])}])
    assert (proof.lost, proof.max_abs_error, proof.sqnr_db) == (0.25, math.inf, -math.inf)


def test_worse_is_more_lost_or_more_noise():
    good = Proof(1, 0.1, 60.0, None, 0.0, ())
    assert not good.is_worse_than(good)
    assert dataclasses.replace(good, sqnr_db=50.0).is_worse_than(good)
    assert not dataclasses.replace(good, sqnr_db=59.5).is_worse_than(good)
    lost = dataclasses.replace(good, lost=0.5, sqnr_db=-math.inf)
    assert lost.is_worse_than(good)
    assert not good.is_worse_than(lost)
    assert not lost.is_worse_than(lost)
