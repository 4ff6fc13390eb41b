"""Parity against float64 formulas, cases by hand, and properties."""

from __future__ import annotations

import json
import math

import ml_dtypes
import numpy as np
import pytest
import scipy.spatial.distance
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import ParityError, UsageError
from edgekit.verify import LOWEST_SQNR_DB, Parity, assert_close, compare, outputs_vary, tolerance

NAN, INF = math.nan, math.inf


def one(*values: float, dtype: object = np.float32) -> list[dict[str, np.ndarray]]:
    """A single batch with the single output `y`."""
    return [{"y": np.array(values, dtype=dtype)}]


def random_outputs(seed: int, batches: int = 3) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        {"logits": rng.normal(0, 3, (4, 10)).astype(np.float32), "map": rng.normal(0, 30, (4, 2, 5)).astype(np.float32)}
        for _ in range(batches)
    ]


def noisy(outputs: list[dict[str, np.ndarray]], relative: float, seed: int = 9) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        {name: (a + relative * np.abs(a).max() * rng.uniform(-1, 1, a.shape)).astype(a.dtype) for name, a in b.items()} for b in outputs
    ]


def joined(outputs: list[dict[str, np.ndarray]], *names: str) -> np.ndarray:
    return np.concatenate([batch[name].ravel().astype(np.float64) for batch in outputs for name in names])


def test_against_float64_formulas_over_batches_and_outputs():
    reference = random_outputs(0)
    result = noisy(reference, 0.2)
    parity = compare(reference, result)
    expected, found = joined(reference, "logits", "map"), joined(result, "logits", "map")
    assert parity.max_abs_error == np.abs(expected - found).max()
    assert parity.sqnr_db == pytest.approx(10 * np.log10((expected**2).sum() / ((expected - found) ** 2).sum()), rel=1e-12)
    assert parity.cosine == pytest.approx(1 - scipy.spatial.distance.cosine(expected, found), rel=1e-12)
    relative = {
        name: np.abs(joined(reference, name) - joined(result, name)).max() / np.abs(joined(reference, name)).max()
        for name in ("logits", "map")
    }
    assert parity.worst_output == max(relative, key=relative.get)
    assert parity.max_rel_error == pytest.approx(max(relative.values()))
    logits, moved = (np.concatenate([batch["logits"] for batch in outputs]) for outputs in (reference, result))
    agreement = (logits.argmax(1) == moved.argmax(1)).mean()
    assert parity.top1_agreement == agreement
    assert 0 < agreement < 1
    assert parity.unequal is None


def test_by_hand():
    parity = compare(one(3.0, -4.0, 0.0), one(3.0, -4.0, 0.5))
    assert parity.max_abs_error == 0.5
    assert parity.max_rel_error == 0.125
    assert parity.sqnr_db == pytest.approx(20.0)
    assert parity.cosine == pytest.approx(25 / (5 * math.sqrt(25.25)))
    assert parity.top1_agreement is None
    assert parity.worst_output == "y"


def test_identical():
    outputs = random_outputs(1)
    parity = compare(outputs, outputs)
    assert parity == Parity(0.0, 0.0, INF, 1.0, 1.0, None, None)
    assert assert_close(outputs, outputs, stage="a pass") == parity
    assert parity.to_dict()["sqnr_db"] is None


def test_errors_below_float32_are_summed_in_float64():
    reference = [{"y": np.full(10**6, 1000.0, np.float32)}]
    result = [{"y": np.nextafter(np.full(10**6, 1000.0, np.float32), np.float32(2000))}]
    error = float(result[0]["y"][0]) - 1000.0
    assert compare(reference, result).sqnr_db == pytest.approx(20 * math.log10(1000.0 / error), rel=1e-9)


@pytest.mark.parametrize("scale", [1e300, 1e-300, 2.0**-1060])
def test_squares_outside_of_float64(scale):
    """The ratio is taken without squaring values whose squares float64 cannot hold."""
    reference, result = one(3 * scale, 4 * scale, dtype=np.float64), one(3 * scale, 4.5 * scale, dtype=np.float64)
    assert compare(reference, result).sqnr_db == pytest.approx(20.0, abs=1e-2)
    assert compare(reference, result).cosine == pytest.approx(27 / (5 * math.sqrt(29.25)), rel=1e-3)


def test_nan_and_infinity_at_equal_positions_are_equal_and_left_out():
    parity = compare(one(NAN, INF, -INF, 3.0, 4.0), one(NAN, INF, -INF, 3.0, 4.5))
    assert parity == compare(one(3.0, 4.0), one(3.0, 4.5))
    assert compare(one(NAN, INF), one(NAN, INF)).to_dict() | {"sqnr_db": "none"} == compare(one(1.0), one(1.0)).to_dict() | {
        "sqnr_db": "none"
    }


@pytest.mark.parametrize(
    ("expected", "found"), [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, INF), (INF, -INF), (NAN, INF), (-INF, NAN), (65504.0, INF)]
)
def test_nan_and_infinity_elsewhere_are_an_infinite_error(expected, found):
    parity = compare(one(expected, 2.0), one(found, 2.0))
    assert parity.max_abs_error == INF
    assert parity.max_rel_error == INF
    assert parity.sqnr_db == LOWEST_SQNR_DB
    assert parity.cosine is None
    assert parity.worst_output == "y"
    assert json.loads(json.dumps(parity.to_dict(), allow_nan=False))["max_abs_error"] is None
    with pytest.raises(ParityError, match="NaN or infinity on one side only"):
        assert_close(one(expected, 2.0), one(found, 2.0), stage="a pass")


def test_overflow_of_the_difference_is_an_infinite_error():
    assert compare(one(1.7e308, dtype=np.float64), one(-1.7e308, dtype=np.float64)).max_abs_error == INF


def test_an_all_zero_reference():
    assert compare(one(0.0, 0.0), one(0.0, -0.0)).sqnr_db == INF
    parity = compare(one(0.0, 0.0), one(0.0, 1.0))
    assert parity.sqnr_db == LOWEST_SQNR_DB
    assert parity.max_abs_error == 1.0
    assert parity.max_rel_error == INF
    assert parity.cosine is None


def test_empty_outputs_are_equal():
    outputs = [{"boxes": np.zeros((0, 4), np.float32), "ids": np.zeros(0, np.int64)}]
    assert assert_close(outputs, outputs, stage="a pass") == Parity(0.0, 0.0, INF, 1.0, None, 0.0, None)


def test_scalar_outputs():
    assert compare([{"y": np.array(2.0)}], [{"y": np.array(2.5)}]).max_abs_error == 0.5


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        (np.array([1, 2, 3, 4]), np.array([1, 2, 30000, 4])),
        (np.array([True, False, True, True]), np.array([True, True, True, True])),
        (np.array([2**62, 2**53, 0, 1]), np.array([2**62 + 1, 2**53, 0, 1])),  # float64 cannot tell these two apart
        (np.array([255, 0, 1, 2], np.uint8), np.array([0, 0, 1, 2], np.uint8)),
        (np.array(["a", "b", "c", "d"], object), np.array(["a", "b", "c", "e"])),
        (np.array([1, 2, 3, 4], ml_dtypes.int4), np.array([1, 2, 3, 5], ml_dtypes.int4)),
    ],
)
def test_outputs_that_are_not_floats_are_compared_exactly(expected, found):
    parity = compare([{"y": expected}], [{"y": found}])
    assert parity.unequal == 0.25
    assert (parity.max_abs_error, parity.max_rel_error) == (1.0, 1.0)
    assert parity.sqnr_db == pytest.approx(10 * math.log10(4))
    assert parity.cosine is None
    assert parity.worst_output == "y"
    with pytest.raises(ParityError, match="1 of 4 elements differ"):
        assert_close([{"y": expected}], [{"y": found}], stage="a pass", precision="bf16")
    assert compare([{"y": expected}], [{"y": expected}]).sqnr_db == INF


def test_integers_do_not_enter_the_ratio_of_floats():
    reference = [{"y": np.array([3.0, 4.0]), "class": np.array([7, 9])}]
    result = [{"y": np.array([3.0, 4.5]), "class": np.array([7, 9])}]
    assert compare(reference, result).sqnr_db == pytest.approx(20.0)
    assert compare(reference, result).unequal == 0.0


def test_complex_outputs_are_two_numbers_each():
    reference, result = one(3 + 4j, dtype=np.complex64), one(3 + 4.5j, dtype=np.complex64)
    assert compare(reference, result).sqnr_db == pytest.approx(20.0)
    assert compare(reference, result).max_abs_error == 0.5
    with pytest.raises(ParityError):
        assert_close(reference, result, stage="a pass")


def test_bfloat16_outputs():
    assert compare(one(3.0, 4.0, dtype=ml_dtypes.bfloat16), one(3.0, 4.5, dtype=ml_dtypes.bfloat16)).sqnr_db == pytest.approx(20.0)


def scores(*rows: list[float], dtype: object = np.float32) -> list[dict[str, np.ndarray]]:
    return [{"y": np.array(rows, dtype=dtype)}]


def test_top1_agreement_by_hand():
    assert compare(scores([1, 2], [2, 1], [5, 0], [0, 5]), scores([2, 1], [2, 1], [9, 8], [0, 1])).top1_agreement == 0.75


def test_top1_agreement_is_of_the_worst_head():
    reference = [{"a": np.eye(4), "b": np.eye(4)}]
    result = [{"a": np.eye(4), "b": np.eye(4)[[0, 1, 2, 0]]}]
    assert compare(reference, result).top1_agreement == 0.75


@pytest.mark.parametrize("array", [np.zeros((3, 1)), np.zeros((2, 3, 4)), np.zeros(5), np.zeros((2, 3), int), np.zeros((2, 3), complex)])
def test_no_agreement_without_class_scores(array):
    assert compare([{"y": array}], [{"y": array}]).top1_agreement is None


def test_a_tie_of_the_reference_within_rounding_counts_as_agreement():
    above = float(np.nextafter(np.float32(1), np.float32(2)))
    assert compare(scores([1.0, above, 0.0]), scores([above, 1.0, 0.0])).top1_agreement == 1.0
    assert compare(scores([1.0, 1.0, 0.0]), scores([1.0, 1.1, 0.0])).top1_agreement == 1.0
    assert compare(scores([1.0, 1.0001, 0.0]), scores([1.0001, 1.0, 0.0])).top1_agreement == 0.0


def test_a_tie_of_the_result_is_no_agreement():
    """Else a broken model with constant scores would agree with everything."""
    assert compare(scores([0.0, 1.0], [1.0, 0.0]), scores([0.0, 0.0], [0.0, 0.0])).top1_agreement == 0.5


def test_agreement_with_nan_and_infinity():
    reference = scores([NAN, 1.0], [1.0, 0.0], [INF, 0.0], [-INF, -INF], [-INF, 1.0])
    assert compare(reference, reference).top1_agreement == 1.0
    result = scores([2.0, 1.0], [NAN, 0.0], [INF, 0.0], [-INF, -INF], [1.0, -INF])
    assert compare(reference, result).top1_agreement == 0.4


def renamed(outputs: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    return [{"other" if name == "map" else name: array for name, array in batch.items()} for batch in outputs]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, "lost output 'map'"),
        (lambda outputs: [{**batch, "extra": np.zeros(1)} for batch in outputs], "added output 'extra'"),
        (
            lambda outputs: [{**batch, "map": batch["map"][:, :1]} for batch in outputs],
            r"shape of output 'map' from \[4, 2, 5\] to \[4, 1, 5\]",
        ),
        (lambda outputs: [{**batch, "map": batch["map"][..., None]} for batch in outputs], "shape of output 'map'"),
        (lambda outputs: [{**batch, "map": batch["map"].astype(int)} for batch in outputs], "dtype of output 'map' from float32 to int64"),
        (lambda outputs: [{**batch, "map": batch["map"].astype(complex)} for batch in outputs], "dtype of output 'map'"),
        (lambda outputs: [{**batch, "map": list(batch["map"])} for batch in outputs], "'map' is not a tensor"),
        (lambda outputs: outputs[:2], "2 batches, the reference for 3"),
    ],
)
def test_outputs_that_cannot_be_compared(change, message):
    reference = random_outputs(2)
    with pytest.raises(ParityError, match=message):
        compare(reference, change(reference))
    with pytest.raises(ParityError, match=f"a pass.*{message}|{message}"):
        assert_close(reference, change(reference), stage="a pass")


def test_a_reference_that_is_not_a_tensor():
    with pytest.raises(ParityError, match="'y' is not a tensor"):
        compare([{"y": [1.0]}], one(1.0))


def test_widths_of_integers_must_be_equal():
    with pytest.raises(ParityError, match="from int64 to int32"):
        compare([{"y": np.arange(3)}], [{"y": np.arange(3, dtype=np.int32)}])


def test_widths_of_floats_are_measured_across_but_not_exact():
    reference = random_outputs(3)
    result = [{name: array.astype(np.float16) for name, array in batch.items()} for batch in reference]
    assert 60 < compare(reference, result).sqnr_db < 90
    with pytest.raises(ParityError, match="from float32 to float16"):
        assert_close(reference, result, stage="a pass")


@pytest.mark.parametrize("outputs", [[], [{}]])
def test_nothing_to_compare_is_not_parity(outputs):
    with pytest.raises(ParityError, match="no outputs to compare"):
        compare(outputs, outputs)


def test_the_error_names_the_stage_the_output_the_place_and_both_numbers():
    reference = random_outputs(4)
    result = [{name: array.copy() for name, array in batch.items()} for batch in reference]
    result[1]["map"][2, 1, 3] += 1.0
    with pytest.raises(ParityError) as caught:
        assert_close(reference, result, stage="pass 'fold-batch-norm'")
    column = max(np.abs(batch["map"][..., 3]).max() for batch in reference)
    assert caught.value.what.startswith(
        f"pass 'fold-batch-norm' changed output 'map': max abs error 1 in channel 3, allowed {1e-4 * column:.3g} "
    )
    assert caught.value.where == "output 'map' float32, worst at batch 1, index [2, 1, 3]"
    assert caught.value.fix


def test_the_error_is_about_the_output_that_is_furthest_beyond_its_limit():
    reference = random_outputs(5)
    result = [{"logits": batch["logits"] * np.float32(1.05), "map": batch["map"] * np.float32(1.01)} for batch in reference]
    with pytest.raises(ParityError, match=r"output 'logits'.*2 of 2 outputs"):
        assert_close(reference, result, stage="a pass")


def test_large_channels_do_not_hide_wrong_small_ones():
    reference = [{"boxes": np.array([[640.0, 0.9, 0.1], [12.0, 0.2, 0.8]], np.float32)}]
    wrong = [{"boxes": np.array([[640.0, 0.85, 0.15], [12.0, 0.2, 0.8]], np.float32)}]
    rounded = [{"boxes": reference[0]["boxes"] * np.float32(1 + 5e-5)}]
    assert_close(reference, rounded, stage="a pass")
    with pytest.raises(ParityError, match=r"in channel [12]"):
        assert_close(reference, wrong, stage="a pass")


@pytest.mark.parametrize(
    ("kind", "relative"),
    [("fp64", 1e-9), ("fp32", 1e-4), ("fp16", 2e-2), ("bf16", 8e-2), ("float16", 2e-2), ("bfloat16", 8e-2), ("int8", 0)],
)
def test_tolerances(kind, relative):
    assert tolerance(kind).relative == relative
    assert tolerance(kind).why


def test_tolerance_of_a_numpy_dtype():
    assert tolerance(np.dtype(np.float32)) == tolerance("fp32")
    assert tolerance(np.dtype(ml_dtypes.bfloat16)) == tolerance("bf16")
    assert tolerance(np.dtype(bool)) == tolerance(np.dtype(np.uint8)) == tolerance("int64")


def test_unknown_precision():
    with pytest.raises(UsageError, match="'fp31'"):
        tolerance("fp31")
    with pytest.raises(UsageError):
        assert_close(one(1.0), one(1.0), stage="a pass", precision="fp8")


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_limit_is_a_share_of_the_largest_magnitude_over_all_batches(dtype):
    limit = tolerance(np.dtype(dtype)).relative
    scale = 64.0  # in the first batch only
    reference = [{"y": np.array([-scale, 0.0], dtype)}, {"y": np.array([0.0, 0.0], dtype)}]
    for factor, within in ((0.9, True), (1.1, False)):
        result = [reference[0], {"y": np.array([0.0, factor * limit * scale], dtype)}]
        if within:
            assert assert_close(reference, result, stage="a pass").max_abs_error > 0
        else:
            with pytest.raises(ParityError, match="a pass changed output 'y'"):
                assert_close(reference, result, stage="a pass")


def test_small_probabilities_are_held_to_their_own_scale():
    """An absolute tolerance of 1e-5 or 1e-6, as is usual, would pass these."""
    reference = [{"y": np.full((1, 50000), 2e-5, np.float32)}]
    with pytest.raises(ParityError):
        assert_close(reference, [{"y": reference[0]["y"] * np.float32(1.01)}], stage="a pass")


def test_a_zero_output_has_a_floor():
    assert_close(one(0.0, 0.0), one(0.0, 5e-9), stage="a pass")
    with pytest.raises(ParityError, match="at least 1e-08"):
        assert_close(one(0.0, 0.0), one(0.0, 1e-6), stage="a pass")


def test_every_output_has_its_own_limit():
    reference = [{"large": np.array([1e6]), "small": np.array([1.0])}]
    with pytest.raises(ParityError, match="'small'"):
        assert_close(reference, [{"large": np.array([1e6]), "small": np.array([1.001])}], stage="a pass", precision="fp32")


def test_the_precision_widens_the_limit_but_never_narrows_it():
    reference, result = one(1.0, 0.5), one(1.0, 0.51)
    with pytest.raises(ParityError):
        assert_close(reference, result, stage="lowering")
    with pytest.raises(ParityError):
        assert_close(reference, result, stage="lowering", precision="fp32")
    assert_close(reference, result, stage="lowering", precision="fp16")
    assert_close(one(1.0, 0.5, dtype=np.float16), one(1.0, 0.51, dtype=np.float16), stage="lowering", precision="fp32")


def test_outputs_vary():
    outputs = random_outputs(6)
    assert outputs_vary(outputs)
    assert not outputs_vary([outputs[0]] * 3)
    assert outputs_vary([outputs[0], {**outputs[0], "map": outputs[1]["map"]}])
    assert not outputs_vary([outputs[0], noisy(outputs[:1], 1e-6)[0]])
    assert outputs_vary([{"y": np.zeros(2)}, {"y": np.zeros(3)}])
    assert outputs_vary([{"y": np.array([1])}, {"y": np.array([2])}])
    assert not outputs_vary([{"y": np.array([NAN, 1.0])}] * 2)


def test_outputs_vary_within_one_batch():
    assert outputs_vary(random_outputs(7, batches=1))
    assert not outputs_vary([{"y": np.ones((4, 3), np.float32)}])
    assert outputs_vary([{"y": np.array([1.0, 2.0], np.float32)}])
    assert not outputs_vary([{"y": np.arange(3.0)[None]}])
    assert not outputs_vary([{"y": np.array(1.0)}])
    assert not outputs_vary([])


vectors = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=12)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(-1e3, 1e3, width=32), st.floats(-1e3, 1e3, width=32)), min_size=1, max_size=12))
def test_error_and_cosine_are_symmetric(pairs):
    first, second = (one(*values) for values in zip(*pairs, strict=True))
    there, back = compare(first, second), compare(second, first)
    assert there.max_abs_error == back.max_abs_error
    assert there.cosine == (None if back.cosine is None else pytest.approx(back.cosine, abs=1e-12))
    assert (there.sqnr_db == INF) == (there.max_abs_error == 0) == (there.worst_output is None)


@settings(deadline=None, derandomize=True)
@given(vectors, st.integers(-40, 40), st.integers(0, 2**32 - 1))
def test_scaling_both_leaves_the_ratios_alone(values, exponent, seed):
    reference = np.array(values, np.float64)
    result = reference + np.random.default_rng(seed).normal(0, 0.1, reference.shape)
    scale = 2.0**exponent
    plain, scaled = compare([{"y": reference}], [{"y": result}]), compare([{"y": reference * scale}], [{"y": result * scale}])
    assert scaled.sqnr_db == pytest.approx(plain.sqnr_db, rel=1e-12)
    assert scaled.cosine == (None if plain.cosine is None else pytest.approx(plain.cosine, rel=1e-12))
    assert scaled.max_rel_error == plain.max_rel_error
    assert scaled.max_abs_error == plain.max_abs_error * scale


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_order_of_elements_batches_and_outputs_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    reference = random_outputs(seed)
    result = noisy(reference, 0.3, seed + 1)
    rows, batches = rng.permutation(4), rng.permutation(3)
    shuffled = [
        [{name: outputs[batch][name][rows] for name in reversed(outputs[batch])} for batch in batches] for outputs in (reference, result)
    ]
    plain, moved = compare(reference, result), compare(*shuffled)
    assert moved.sqnr_db == pytest.approx(plain.sqnr_db, rel=1e-12)
    assert moved.cosine == pytest.approx(plain.cosine, rel=1e-12)
    assert (moved.max_abs_error, moved.max_rel_error, moved.top1_agreement, moved.worst_output) == (
        plain.max_abs_error,
        plain.max_rel_error,
        plain.top1_agreement,
        plain.worst_output,
    )


@settings(deadline=None, derandomize=True)
@given(vectors, st.integers(1, 5))
def test_splitting_into_batches_does_not_matter(values, parts):
    reference, result = np.array(values, np.float32), np.array(values[::-1], np.float32)
    whole = compare([{"y": reference}], [{"y": result}])
    split = compare(*([{"y": part} for part in np.array_split(array, parts)] for array in (reference, result)))
    assert split.sqnr_db == pytest.approx(whole.sqnr_db, rel=1e-12)
    assert split.max_rel_error == whole.max_rel_error


def test_as_json():
    fields = compare(random_outputs(8), noisy(random_outputs(8), 0.01)).to_dict()
    assert json.loads(json.dumps(fields, allow_nan=False)) == fields
    assert fields.keys() == {"max_abs_error", "max_rel_error", "sqnr_db", "cosine", "top1_agreement", "unequal", "worst_output"}
