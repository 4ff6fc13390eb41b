"""LSTM, GRU and RNN: as MIL's operator where its definition is ONNX's, else written out step by step.

Each direction is computed by itself, the reverse one on reversed input: MIL does not say in which order its own reverse direction puts out.
The orders of gates and the places of biases are those of coremltools' documentation and of its tests of these operators
(coremltools/converters/mil/mil/ops/tests): the reset gate of `gru` is applied before the product unless `reset_after` (iOS18) is set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.targets.coreml.lowering.builder import Lowering
from edgekit.targets.coreml.lowering.recurrent_activations import Activation, activations

_UNROLLED = 32
"""Sequences up to this length are written out; longer ones become a loop, which keeps the program small but leaves the Neural Engine."""


@dataclass
class _Cell:
    """One direction of one node: arrays as ONNX has them, without the axis of directions, and what is made of them.

    Attributes:
        w: Weight of the input, gates one after the other.
        r: Weight of the hidden state.
        wb: Bias of the input.
        rb: Bias of the hidden state.
        p: Peepholes of LSTM; None: none.
        functions: Activations, in ONNX's order.
        clip: Bound of what activations read, of GRU and RNN; 0: none.
        coupled: LSTM's input_forget.
        reset_after: GRU's linear_before_reset.
    """

    w: np.ndarray
    r: np.ndarray
    wb: np.ndarray
    rb: np.ndarray
    p: np.ndarray | None
    functions: list[Activation]
    clip: float
    coupled: bool
    reset_after: bool

    @property
    def hidden(self) -> int:
        """The size of the hidden state."""
        return int(self.r.shape[1])

    def act(self, b: Lowering, index: int, x: Any) -> Any:
        """An activation, after the clip."""
        if self.clip:
            x = b.op("clip", x=x, alpha=-self.clip, beta=self.clip)
        return self.functions[index].apply(b, x)


@dataclass(frozen=True)
class _Kind:
    """What tells LSTM, GRU and RNN apart.

    Attributes:
        gates: Gates of W, R and B.
        states: Indices of the inputs of initial states.
        functions: Default activations.
        native: MIL's operator for a cell, or None where its definition differs.
        prepare: Constants that the steps read, and the bias that is added to the product with the input.
        step: From the gates' part of the input and the states to the next states.
    """

    gates: int
    states: tuple[int, ...]
    functions: tuple[str, ...]
    native: Callable[[Lowering, Any, list[Any], _Cell], tuple[Any, ...] | None]
    prepare: Callable[[_Cell], tuple[list[np.ndarray], np.ndarray]]
    step: Callable[[Lowering, _Cell, list[Any], Any, list[Any]], list[Any]]


def _lower(b: Lowering, node: ir.Node, kind: _Kind) -> Any:
    if not b.at_least("iOS17"):
        b.half = False  # MIL's recurrent operators take float16 from iOS17 on
    cells = _cells(b, node, kind)
    if kind is _LSTM and cells[0].clip:
        raise b.refuse(
            "LSTM with clip: ONNX's text bounds what every activation reads, ONNX Runtime all but the cell state", "leave clip out"
        )
    by_batch = bool(node.attributes.get_int("layout", 0))
    x = b.op("transpose", x=b.x(node), perm=[1, 0, 2]) if by_batch else b.x(node)
    _need_full_sequences(b, node, int(x.shape[0]), int(x.shape[1]))
    sequences, finals = [], []
    for number, (cell, reverse) in enumerate(zip(cells, _reversals(b, node, len(cells)), strict=True)):
        states = [_initial(b, node, index, number, by_batch, int(x.shape[1]), cell.hidden) for index in kind.states]
        given = b.op("reverse", x=x, axes=[0]) if reverse else x
        y, *last = kind.native(b, given, states, cell) or _steps(b, given, states, cell, kind)
        sequences.append(b.op("reverse", x=y, axes=[0]) if reverse else y)
        finals.append(last)
    all_steps = b.op("stack", values=sequences, axis=1)
    ends = [b.op("stack", values=list(values), axis=1 if by_batch else 0) for values in zip(*finals, strict=True)]
    return (b.op("transpose", x=all_steps, perm=[2, 0, 1, 3]) if by_batch else all_steps, *ends)


def _reversals(b: Lowering, node: ir.Node, count: int) -> list[bool]:
    direction = node.attributes.get_string("direction", "forward")
    reversals = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}.get(direction, [])
    if len(reversals) != count:
        raise b.refuse(f"{node.op_type} with direction {direction} and {count} weights", "correct the attribute")
    return reversals


def _cells(b: Lowering, node: ir.Node, kind: _Kind) -> list[_Cell]:
    w, r = (b.need_known(node, index, name) for index, name in ((1, "W"), (2, "R")))
    hidden = r.shape[2]
    zeros = np.zeros((len(w), 2 * kind.gates * hidden), np.float32)
    biases = b.need_known(node, 3, "B") if b.has(node, 3) else zeros
    peepholes = b.need_known(node, 7, "P") if b.has(node, 7) else None
    functions = activations(b, node, kind.functions, len(w))
    size, attributes = kind.gates * hidden, node.attributes
    return [
        _Cell(
            w[number],
            r[number],
            biases[number, :size],
            biases[number, size:],
            None if peepholes is None else peepholes[number],
            functions[number],
            attributes.get_float("clip", 0.0),
            bool(attributes.get_int("input_forget", 0)),
            bool(attributes.get_int("linear_before_reset", 0)),
        )
        for number in range(len(w))
    ]


def _need_full_sequences(b: Lowering, node: ir.Node, length: int, batch: int) -> None:
    if not b.has(node, 4):
        return
    lengths = b.known(node, 4)
    if lengths is None or lengths.tolist() != [length] * batch:
        raise b.refuse(f"{node.op_type} over sequences of different lengths", "leave sequence_lens out and give sequences of one length")


def _initial(b: Lowering, node: ir.Node, index: int, number: int, by_batch: bool, batch: int, hidden: int) -> Any:
    """The initial state of one direction, [batch, hidden]."""
    if not b.has(node, index):
        return b.var(np.zeros((batch, hidden), np.float32))
    axis = 1 if by_batch else 0
    begin, end = [0, 0, 0], list(b.shape(node, index))
    begin[axis], end[axis] = number, number + 1
    return b.op("squeeze", x=b.op("slice_by_index", x=b.x(node, index), begin=begin, end=end), axes=[axis])


def _reordered(array: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """Gates in another order."""
    parts = np.split(array, len(order))
    return np.concatenate([parts[index] for index in order])


def _native_names(cell: _Cell) -> list[str] | None:
    """MIL's names of the cell's activations; None where MIL does not define one of them, or the cell has a clip as only ONNX has it."""
    names = [function.native for function in cell.functions]
    return None if cell.clip or not all(names) else names


def _native_lstm(b: Lowering, x: Any, states: list[Any], cell: _Cell) -> tuple[Any, ...] | None:
    names, order = _native_names(cell), (0, 2, 1, 3)
    if names is None or cell.coupled:
        return None
    gate, candidate, output = names
    y: tuple[Any, ...] = b.op(
        "lstm",
        x=x,
        initial_h=states[0],
        initial_c=states[1],
        weight_ih=_reordered(cell.w, order),
        weight_hh=_reordered(cell.r, order),
        bias=_reordered(cell.wb + cell.rb, order),
        peephole=None if cell.p is None else _reordered(cell.p, (0, 2, 1)),
        direction="forward",
        output_sequence=True,
        recurrent_activation=gate,
        cell_activation=candidate,
        activation=output,
    )
    return tuple(y)


def _native_gru(b: Lowering, x: Any, states: list[Any], cell: _Cell) -> tuple[Any, ...] | None:
    """coremltools' tests keep to a batch of 1 because others come out wrong; a reset after the product needs iOS18."""
    names, order = _native_names(cell), (1, 2, 0)
    if names is None or int(x.shape[1]) > 1 or (cell.reset_after and not b.at_least("iOS18")):
        return None
    after: dict[str, Any] = {"reset_after": True, "input_bias": _reordered(cell.wb, order)} if cell.reset_after else {}
    bias = _reordered(cell.rb if cell.reset_after else cell.wb + cell.rb, order)
    y: tuple[Any, ...] = b.op(
        "gru",
        x=x,
        initial_h=states[0],
        weight_ih=_reordered(cell.w, order),
        weight_hh=_reordered(cell.r, order),
        bias=bias,
        direction="forward",
        output_sequence=True,
        recurrent_activation=names[0],
        activation=names[1],
        **after,
    )
    return tuple(y)


def _native_rnn(b: Lowering, x: Any, states: list[Any], cell: _Cell) -> tuple[Any, ...] | None:
    names = _native_names(cell)
    if names is None:
        return None
    y: tuple[Any, ...] = b.op(
        "rnn",
        x=x,
        initial_h=states[0],
        weight_ih=cell.w,
        weight_hh=cell.r,
        bias=cell.wb + cell.rb,
        direction="forward",
        output_sequence=True,
        activation=names[0],
    )
    return tuple(y)


def _steps(b: Lowering, x: Any, states: list[Any], cell: _Cell, kind: _Kind) -> tuple[Any, ...]:
    """The same results as MIL's operators: the hidden states of all steps, and the last states. The input's products are taken at once."""
    arrays, bias = kind.prepare(cell)
    constants = [b.var(array) for array in arrays]  # here, and not in the loop, where they could be read only inside it
    products = b.op("linear", x=x, weight=cell.w, bias=bias)
    length = int(x.shape[0])

    def step(values: list[Any], part: Any) -> list[Any]:
        return kind.step(b, cell, constants, b.op("squeeze", x=part, axes=[0]), values)

    return _loop(b, products, states, length, step) if length > _UNROLLED else _unrolled(b, products, states, length, step)


_Step = Callable[[list[Any], Any], list[Any]]


def _unrolled(b: Lowering, products: Any, states: list[Any], length: int, step: _Step) -> tuple[Any, ...]:
    parts = b.op("split", x=products, num_splits=length, axis=0) if length > 1 else [products]
    hidden = []
    for part in parts:
        states = step(states, part)
        hidden.append(states[0])
    return (b.op("stack", values=hidden, axis=0), *states)


def _loop(b: Lowering, products: Any, states: list[Any], length: int, step: _Step) -> tuple[Any, ...]:
    batch, hidden = (int(size) for size in states[0].shape)
    start = b.op("fill", shape=[length, batch, hidden], value=0.0)

    def more(index: Any, *_: Any) -> Any:
        return b.op("less", x=b.op("squeeze", x=index, axes=[0]), y=length)

    def body(index: Any, y: Any, *values: Any) -> tuple[Any, ...]:
        following = step(list(values), b.op("gather", x=products, indices=index, axis=0))
        row = b.op("expand_dims", x=following[0], axes=[0])
        written = b.op("scatter", data=y, indices=index, updates=row, axis=0, mode="update")
        return (b.op("add", x=index, y=1), written, *following)

    _, *results = b.op("while_loop", _cond=more, _body=body, loop_vars=(b.var(np.zeros(1, np.int32)), start, *states))
    return tuple(results)


def _plus(b: Lowering, x: Any, y: Any) -> Any:
    return b.op("add", x=x, y=y)


def _times(b: Lowering, x: Any, y: Any) -> Any:
    return b.op("mul", x=x, y=y)


def _prepare_plain(cell: _Cell) -> tuple[list[np.ndarray], np.ndarray]:
    return [cell.r, *([] if cell.p is None else np.split(cell.p, 3))], cell.wb + cell.rb


def _lstm_step(b: Lowering, cell: _Cell, constants: list[Any], part: Any, states: list[Any]) -> list[Any]:
    (r, *peepholes), (h, c) = constants, states
    i, o, f, g = b.op("split", x=_plus(b, part, b.op("linear", x=h, weight=r)), num_splits=4, axis=-1)
    if peepholes:
        i, f = (_plus(b, gate, _times(b, c, peepholes[index])) for gate, index in ((i, 0), (f, 2)))
    i = cell.act(b, 0, i)
    f = b.op("sub", x=1.0, y=i) if cell.coupled else cell.act(b, 0, f)
    c = _plus(b, _times(b, f, c), _times(b, i, cell.act(b, 1, g)))
    o = cell.act(b, 0, _plus(b, o, _times(b, c, peepholes[1])) if peepholes else o)
    return [_times(b, o, cell.act(b, 2, c)), c]


def _prepare_gru(cell: _Cell) -> tuple[list[np.ndarray], np.ndarray]:
    size = cell.hidden
    later = np.concatenate([np.zeros(2 * size, np.float32), cell.rb[2 * size :]])
    if cell.reset_after:
        return [cell.r, later], cell.wb + cell.rb - later
    return [np.ascontiguousarray(cell.r[: 2 * size]), np.ascontiguousarray(cell.r[2 * size :])], cell.wb + cell.rb


def _gru_step(b: Lowering, cell: _Cell, constants: list[Any], part: Any, states: list[Any]) -> list[Any]:
    (h,), size = states, cell.hidden
    of_input, candidate = b.op("split", x=part, split_sizes=[2 * size, size], axis=-1)
    if cell.reset_after:
        product = b.op("linear", x=h, weight=constants[0], bias=constants[1])
        of_state, of_candidate = b.op("split", x=product, split_sizes=[2 * size, size], axis=-1)
    else:
        of_state = b.op("linear", x=h, weight=constants[0])
    z, r = b.op("split", x=cell.act(b, 0, _plus(b, of_input, of_state)), num_splits=2, axis=-1)
    reset = _times(b, r, of_candidate) if cell.reset_after else b.op("linear", x=_times(b, r, h), weight=constants[1])
    new = cell.act(b, 1, _plus(b, candidate, reset))
    return [_plus(b, _times(b, b.op("sub", x=1.0, y=z), new), _times(b, z, h))]


def _rnn_step(b: Lowering, cell: _Cell, constants: list[Any], part: Any, states: list[Any]) -> list[Any]:
    return [cell.act(b, 0, _plus(b, part, b.op("linear", x=states[0], weight=constants[0])))]


_LSTM = _Kind(4, (5, 6), ("Sigmoid", "Tanh", "Tanh"), _native_lstm, _prepare_plain, _lstm_step)
_GRU = _Kind(3, (5,), ("Sigmoid", "Tanh"), _native_gru, _prepare_gru, _gru_step)
_RNN = _Kind(1, (5,), ("Tanh",), _native_rnn, _prepare_plain, _rnn_step)


def _lstm(b: Lowering, node: ir.Node) -> Any:
    return _lower(b, node, _LSTM)


def _gru(b: Lowering, node: ir.Node) -> Any:
    return _lower(b, node, _GRU)


def _rnn(b: Lowering, node: ir.Node) -> Any:
    return _lower(b, node, _RNN)


TABLE = {"GRU": _gru, "LSTM": _lstm, "RNN": _rnn}
