"""What the placement rules look for in one operation. A check returns the reason of a finding, or None.

Limits and claims are those of the sources that `placement_rules` names beside each check.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log, prod

from edgekit.graph.ranges import FLOAT16_MAX, OVERFLOW, SMALLEST_NORMAL, VANISH
from edgekit.targets.coreml.placement_program import FLOATS, Operation, Value
from edgekit.targets.coreml.reference.types import ValueType, numpy_dtype

Check = Callable[[Operation], str | None]

MAX_EXTENT, MAX_CHANNELS = 16384, 65536
"""Reported limits of height and width, and of the other axes, up to the A15."""
MAX_KERNEL_WIDTH, MAX_KERNEL_HEIGHT = 13, 29
"""Reported limits of a float16 convolution on the A13 and M1."""
MAX_DILATION = 8
MAX_ARG_AXIS = 2048
ALIGNMENT = 64
"""Bytes that the last axis of a Neural Engine buffer is aligned to."""
WASTE = 2
"""Padding of the last axis is listed from this multiple of the memory on."""
LARGE_AXIS = 256
"""Sums over fewer elements are not listed: they overflow only where the elements themselves nearly do."""
EXACT_INTEGERS = 2048
"""Up to here float16 holds every integer."""
DEFAULT_EPSILONS = {"rsqrt": 1e-12, "inverse": 1e-4, "log": 1e-45}
"""What coremltools writes where the model says nothing: such an ε is not the model's."""
UNTYPED = frozenset({"cast", "read_state", "write_state", "coreml_update_state", "classify"})
"""Operators that convert, move or name values and are not judged by element types."""
INDEXING = frozenset({"reduce_argmax", "reduce_argmin", "argsort", "topk", "shape", "non_zero"})
"""Operators whose integers are their point; rules of their own look at them."""


def says(reason: str) -> Check:
    """A check that holds wherever the operator is used."""
    return lambda operation: reason


def float32(operation: Operation) -> str | None:
    """Typed execution in float32."""
    if operation.operator in UNTYPED or "fp32" not in operation.computes_in:
        return None
    return "typed float32: runs on the CPU or GPU"


def integers(operation: Operation) -> str | None:
    """Results that are 32-bit integers."""
    if (
        operation.operator in UNTYPED | INDEXING
        or not operation.varying
        or not any(kind.dtype == "int32" for kind in operation.outputs[:1])
    ):
        return None
    return "computes int32: reported as not implemented there"


def to_integers(operation: Operation) -> str | None:
    """A cast to int32."""
    return "cast to int32: reported as rejected on M1" if operation.outputs[0].dtype == "int32" else None


def computed_indices(operation: Operation) -> str | None:
    """Gathering by indices that are not constants."""
    values = operation.inputs.get("indices", ())
    if not any(value.varies for value in values):
        return None
    return "computed indices: a published compute plan of a float16 Whisper decoder supports its gathers on the CPU only"


def unknown_shape(operation: Operation) -> str | None:
    """Sizes that are known only when the program runs."""
    if not any(None in kind.shape for kind in operation.outputs):
        return None
    return "size known only when the program runs: of an input with a range of sizes, only the default shape runs there"


def high_rank(operation: Operation) -> str | None:
    """Ranks above 5."""
    rank = max((len(kind.shape) for kind in operation.outputs), default=0)
    return f"rank {rank}: Core ML supports ranks up to 5" if rank > 5 else None


def linear_rank(operation: Operation) -> str | None:
    """`linear` on five axes."""
    rank = len(operation.shape("x"))
    return f"linear on an input of rank {rank}: reported as rejected from rank 5 on" if rank >= 5 else None


def long_axis(operation: Operation) -> str | None:
    """Axes longer than the engine's buffers; the last two are height and width."""
    constants = [value.type for values in operation.inputs.values() for value in values if not value.varies and len(value.type.shape) > 1]
    kinds = [*operation.outputs, *(value.type for value in operation.varying), *constants]
    for kind in kinds:
        for place, size in enumerate(reversed(kind.shape)):
            limit = MAX_EXTENT if place < 2 else MAX_CHANNELS
            if size is not None and size > limit:
                return f"an axis of {size}: reported limit {limit} up to A15 and M3"
    return None


def kernel(operation: Operation) -> str | None:
    """Large convolution kernels."""
    sizes = operation.shape("weight")[2:]
    if not sizes or None in sizes:
        return None
    width, height = sizes[-1] or 0, (sizes[-2] or 0) if len(sizes) > 1 else 1
    if width > MAX_KERNEL_WIDTH:
        return f"kernel width {width}: reported limit in float16 is {MAX_KERNEL_WIDTH} on A13 and M1, 16 from A14 on"
    return f"kernel height {height}: reported limit is {MAX_KERNEL_HEIGHT} on M1" if height > MAX_KERNEL_HEIGHT else None


def dilated(operation: Operation) -> str | None:
    """Wide dilation."""
    widest = max(operation.known("dilations") or [1])
    if widest <= MAX_DILATION:
        return None
    return f"dilation {widest}: reported as not run; others measured up to {MAX_DILATION} on M1"


def spatial(operation: Operation) -> str | None:
    """Convolution over three axes."""
    return "convolution over three axes: reported to fail in lowering on every device" if len(operation.shape("weight")) == 5 else None


def mirrored(operation: Operation) -> str | None:
    """Padding by other than a constant."""
    mode = operation.known("mode")
    return f"{mode} padding: reported to need A14 or newer" if mode == "reflect" else None


def padded_channels(operation: Operation) -> str | None:
    """Padding of other axes than height and width."""
    amounts = operation.known("pad") or []
    return "pads other axes than the last two: reported as rejected" if any(amounts[:-4]) else None


def long_argument(operation: Operation) -> str | None:
    """Position of a maximum on a long axis."""
    axis, shape = operation.known("axis") or [-1], operation.shape("x")
    size = shape[int(axis[0])] if shape else None
    return f"an axis of {size}: reported limit {MAX_ARG_AXIS}" if size is not None and size > MAX_ARG_AXIS else None


def ragged_state(operation: Operation) -> str | None:
    """States whose last axis is no multiple of 32."""
    kinds = [value.type for values in operation.inputs.values() for value in values if value.type.kind == "state" and value.type.shape]
    odd = next((kind.shape[-1] for kind in kinds if kind.shape[-1] is not None and kind.shape[-1] % 32), None)
    return None if odd is None else f"a state whose last axis is {odd}, no multiple of 32: reported to fail on an M4 with macOS 15.2"


def padded_axis(operation: Operation) -> str | None:
    """A short last axis, which is padded to 64 bytes."""
    worst = max((_waste(kind) for kind in operation.outputs), default=(0.0, 0, 0))
    waste, size, width = worst
    if waste < WASTE:
        return None
    return f"a last axis of {size} × {width} bytes is padded to a multiple of {ALIGNMENT} bytes: {waste:g}× the memory"


def _waste(kind: ValueType) -> tuple[float, int, int]:
    size = kind.shape[-1] if len(kind.shape) > 1 else None
    if not size or kind.dtype in ("fp32", "int32", "string", "bool", ""):
        return 0.0, 0, 0
    width = numpy_dtype(kind.dtype).itemsize
    used = size * width
    return round(-(-used // ALIGNMENT) * ALIGNMENT / used, 1), size, width


def moves(operation: Operation) -> str | None:
    """Transposes and reshapes of float16 values that move more than axes of size 1."""
    if not operation.half:
        return None
    before, after = operation.shape("x"), operation.outputs[0].shape
    order = operation.known("perm")
    if order is not None:
        kept = [int(axis) % len(before) for axis in order if before[int(axis)] != 1]
        stays = kept == sorted(kept) and before[-1:] == after[-1:]
        return None if stays else "a transpose is likely to copy unless specially handled"
    if [size for size in before if size != 1] == [size for size in after if size != 1] and before[-1:] == after[-1:]:
        return None
    return "a reshape is likely to copy unless specially handled"


def huge_constant(operation: Operation) -> str | None:
    """Constants that are infinite in float16."""
    for parameter, value in _floats(operation):
        extent = value.constant.extent if value.constant else None
        if extent and (extent.infinite or extent.largest >= OVERFLOW):
            held = f"reaches {extent.largest:.3g}, infinite in float16" if extent.largest >= OVERFLOW else "holds infinity"
            return f"constant '{parameter}' {held}; of a mask: a row that is masked whole becomes NaN"
    return None


def tiny_constant(operation: Operation) -> str | None:
    """Constants of which float16 keeps nothing, or of one element (an ε) less than 11 bits."""
    for parameter, value in _floats(operation):
        if value.constant is None or (parameter == "epsilon" and operation.known(parameter) == _default(operation)):
            continue
        extent = value.constant.extent
        if 0 < extent.largest <= VANISH:
            return f"constant '{parameter}' = {extent.largest:.3g} is zero in float16 (smallest number 6e-8)"
        if extent.elements == 1 and 0 < extent.largest < SMALLEST_NORMAL:
            return f"constant '{parameter}' = {extent.largest:.3g} is below float16's smallest normal number 6.1e-5"
    return None


def zero_epsilon(operation: Operation) -> str | None:
    """An ε that is zero already."""
    return "its ε is zero in the program: a row of equal numbers is divided by zero" if operation.known("epsilon") == [0.0] else None


def _default(operation: Operation) -> list[float] | None:
    """The operator's default ε, as float32 holds it."""
    import numpy as np

    default = DEFAULT_EPSILONS.get(operation.operator)
    return None if default is None else [float(np.float32(default))]


def _floats(operation: Operation) -> list[tuple[str, Value]]:
    return [
        (parameter, value)
        for parameter, values in operation.inputs.items()
        for value in values
        if value.constant is not None and value.type.kind == "tensor" and value.type.dtype in FLOATS
    ]


def exponential(operation: Operation) -> str | None:
    """exp of anything but x - max(x)."""
    if not operation.half:
        return None
    source = operation.maker("x")
    shifted = source is not None and source.operator == "sub" and getattr(source.maker("y"), "operator", "") == "reduce_max"
    return None if shifted else f"overflows float16 for x > {log(FLOAT16_MAX):.2f}; subtract the maximum first"


def squares(operation: Operation) -> str | None:
    """Squares and higher powers."""
    power = 2.0 if operation.operator == "square" else (operation.known("y") or [0.0])[0]
    if not operation.half or power < 2:
        return None
    return f"x^{power:g} overflows float16 for |x| > {FLOAT16_MAX ** (1 / power):.4g}"


def square_sums(operation: Operation) -> str | None:
    """Sums of squares."""
    count = _reduced(operation)
    if not operation.half or count is None:
        return None
    return f"the sum of {count} squares overflows float16 for a root mean square above {(FLOAT16_MAX / count) ** 0.5:.3g}"


def long_sums(operation: Operation) -> str | None:
    """Sums over many elements."""
    count = _reduced(operation)
    if not operation.half or count is None:
        return None
    return f"the sum of {count} elements overflows float16 for a mean above {FLOAT16_MAX / count:.3g}"


def log_sum_exp(operation: Operation) -> str | None:
    """The logarithm of a sum of exponentials."""
    count = _reduced(operation, 1)
    if not operation.half or count is None:
        return None
    return f"reported to compute the exponentials without the maximum subtracted: overflows for x > {log(FLOAT16_MAX / count):.2f}"


def _reduced(operation: Operation, least: int = LARGE_AXIS) -> int | None:
    """Over how many elements it reduces, where they are known and at least `least`."""
    shape = operation.shape("x")
    sizes = [shape[int(axis)] for axis in operation.known("axes") or range(len(shape))]
    if None in sizes:
        return None
    count = prod(size or 0 for size in sizes)
    return count if count >= least else None


def cast_back(operation: Operation) -> str | None:
    """float32 to float16 and back: rounded for nothing; integers that float16 does not hold."""
    source = operation.inputs["x"][0]
    types = [source.type.dtype, operation.outputs[0].dtype]
    if types[1] == "fp16" and types[0] in ("int32", "uint32", "int16", "uint16") and source.varies:
        return f"integers above {EXACT_INTEGERS} are rounded in float16"
    if source.maker is not None and source.maker.operator == "cast":
        types.insert(0, source.maker.inputs["x"][0].type.dtype)
    return "float32 is rounded to float16 and back" if types == ["fp32", "fp16", "fp32"] else None
