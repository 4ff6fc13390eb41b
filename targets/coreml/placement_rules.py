"""The rules of `placement`: what is documented or reported to leave the Neural Engine, to copy, or to go wrong in float16.

Apple documents little of it and says that it changes with device, system and sizes (https://github.com/apple/coremltools/issues/1780),
so each rule names its source, and reasons that rest on measurements of others say "reported".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgekit.targets.coreml import placement_checks as checks
from edgekit.targets.coreml.placement_checks import Check, says

Kind = Literal["leaves the Neural Engine", "float16 risk", "layout copy"]
LEAVES: Kind = "leaves the Neural Engine"
RISK: Kind = "float16 risk"
COPY: Kind = "layout copy"

_TRANSFORMERS = "https://machinelearning.apple.com/research/neural-engine-transformers"
_TYPED = "https://apple.github.io/coremltools/docs-guides/source/typed-execution-example.html"
_FORUM = "https://developer.apple.com/forums/thread/724930"
_ISSUES = "https://github.com/apple/coremltools/issues/"
_PULLS = "https://github.com/apple/coremltools/pull/"
_UNSUPPORTED = "https://github.com/hollance/neural-engine/blob/master/docs/unsupported-layers.md"
_HALF = "https://github.com/hollance/neural-engine/blob/master/docs/16-bit.md"
_CAPABILITIES = "https://ane-guide.readthedocs.io/en/latest/part-1-machine/04-capability-surface.html"
_DESIGN = "https://ane-guide.readthedocs.io/en/latest/part-5-practice/17-model-design-rules.html"
_CATALOG = "https://aneforge.readthedocs.io/en/latest/op-catalog/"
_DECODER_PLAN = "https://huggingface.co/SingularityUS/atc-whisperkit/blob/main/small/TextDecoder.mlcomputeplan.json"
_DETECTOR_PLAN = "https://github.com/roboflow/rf-detr/pull/1495"
_BINARY16 = "IEEE 754-2019, binary16"

_EVERYWHERE = "reported without a path on the Neural Engine of any device"


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Attributes:
        kind: What the finding says.
        operators: MIL's names of the operators that it looks at, separated by blanks; empty: all of them.
        check: Returns the reason, or None where it does not apply.
        source: Where the claim stands: an address, or the title of a document.
    """

    kind: Kind
    operators: str
    check: Check
    source: str


RULES: tuple[Rule, ...] = (
    Rule(LEAVES, "", checks.float32, _TYPED),
    Rule(LEAVES, "", checks.integers, _CAPABILITIES),
    Rule(LEAVES, "cast", checks.to_integers, _CAPABILITIES),
    Rule(LEAVES, "", checks.unknown_shape, _FORUM),
    Rule(LEAVES, "", checks.high_rank, f"{_ISSUES}1723"),
    Rule(LEAVES, "", checks.long_axis, _DESIGN),
    Rule(LEAVES, "lstm gru rnn", says("RNN and LSTM are not supported on the Neural Engine"), f"{_ISSUES}1780"),
    Rule(LEAVES, "resample", says("grid sampling: reported on the CPU only; others report A14 and newer"), f"{_ISSUES}1875"),
    Rule(LEAVES, "custom_layer", says("custom layers have implementations for the CPU and GPU only"), _UNSUPPORTED),
    Rule(LEAVES, "topk", says("reported on the CPU with what consumes its indices (M3 Pro, macOS 27)"), _DETECTOR_PLAN),
    Rule(LEAVES, "gather gather_along_axis gather_nd", checks.computed_indices, _DECODER_PLAN),
    Rule(LEAVES, "scatter scatter_along_axis scatter_nd reduce_prod mod one_hot band_part", says(_EVERYWHERE), _CAPABILITIES),
    Rule(LEAVES, "non_zero shape reverse_sequence sliding_windows", says(_EVERYWHERE), _CAPABILITIES),
    Rule(LEAVES, "logical_and logical_or logical_xor", says(_EVERYWHERE), _CAPABILITIES),
    Rule(LEAVES, "tan acos asin atanh cosh sinh", says(_EVERYWHERE), _CAPABILITIES),
    Rule(LEAVES, "random_bernoulli random_categorical random_normal", says(_EVERYWHERE), _CAPABILITIES),
    Rule(LEAVES, "make_list list_gather list_length list_read list_scatter list_write", says(_EVERYWHERE), _CATALOG),
    Rule(LEAVES, "cond while_loop", says("control flow: reported without code of its own for the Neural Engine"), _CATALOG),
    Rule(LEAVES, "cumsum", says("the standard cumsum is reported as not implemented there"), _CATALOG),
    Rule(LEAVES, "argsort", says("reported as rejected on M1; A14 and newer have it"), _CATALOG),
    Rule(LEAVES, "reduce_argmin", says("reported to need A15 or newer"), _CATALOG),
    Rule(LEAVES, "sin cos", says("reported to need A15 or newer"), _CAPABILITIES),
    Rule(LEAVES, "crop_resize affine", says("reported to need A14 or newer"), _CAPABILITIES),
    Rule(LEAVES, "range_1d", says("reported as rejected on M1"), _CATALOG),
    Rule(
        LEAVES,
        "resize resize_bilinear resize_nearest_neighbor upsample_bilinear upsample_nearest_neighbor",
        says("reported as native from A14 on; on M1 a fallback of other rounding, in which some modes fail"),
        _CATALOG,
    ),
    Rule(LEAVES, "conv", checks.spatial, _CAPABILITIES),
    Rule(LEAVES, "conv conv_transpose", checks.kernel, _CAPABILITIES),
    Rule(LEAVES, "conv conv_transpose", checks.dilated, _UNSUPPORTED),
    Rule(LEAVES, "linear", checks.linear_rank, _DESIGN),
    Rule(LEAVES, "pad", checks.mirrored, _DESIGN),
    Rule(LEAVES, "pad", checks.padded_channels, _DESIGN),
    Rule(LEAVES, "reduce_argmax reduce_argmin", checks.long_argument, _DESIGN),
    Rule(LEAVES, "read_state coreml_update_state", checks.ragged_state, f"{_ISSUES}2631"),
    Rule(COPY, "", checks.padded_axis, _TRANSFORMERS),
    Rule(COPY, "transpose reshape", checks.moves, _TRANSFORMERS),
    Rule(RISK, "", checks.huge_constant, f"{_PULLS}2669"),
    Rule(RISK, "", checks.tiny_constant, _HALF),
    Rule(RISK, "layer_norm batch_norm instance_norm l2_norm", checks.zero_epsilon, _HALF),
    Rule(RISK, "exp", checks.exponential, f"{_ISSUES}2729"),
    Rule(RISK, "softplus", says("reported to drop to 0 for x > 10.4 on the Neural Engine"), f"{_ISSUES}2687"),
    Rule(RISK, "reduce_log_sum_exp", checks.log_sum_exp, f"{_ISSUES}2690"),
    Rule(RISK, "square pow", checks.squares, _BINARY16),
    Rule(RISK, "reduce_sum_square", checks.square_sums, _BINARY16),
    Rule(RISK, "reduce_sum", checks.long_sums, _BINARY16),
    Rule(RISK, "cast", checks.cast_back, _BINARY16),
)
"""Each is asked about each operation whose operator it names."""
