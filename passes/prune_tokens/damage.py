"""What a schedule does to the outputs: measured on the calibration inputs, beside the graph as it was."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgekit.contracts import Arrays
from edgekit.errors import DataError
from edgekit.graph import run
from edgekit.passes.prune_tokens.blocks import blocks_of, find_blocks
from edgekit.passes.prune_tokens.reduce import How, reduce_tokens
from edgekit.passes.prune_tokens.schedule import Step
from edgekit.passes.prune_tokens.token_axis import follow

_MOST_BATCHES = 32


class Damage:
    """Measures schedules on one graph.

    Args:
        model: The graph; it is not changed.
        feeds: Calibration batches.

    Raises:
        DataError: There are none, or they hold NaN.
    """

    def __init__(self, model: ir.Model, feeds: Sequence[Arrays]) -> None:
        self._model = model
        self._feeds = list(feeds)[:_MOST_BATCHES]
        if not self._feeds:
            raise DataError("a schedule is searched on calibration inputs, and there are none", fix="give --data")
        for feed in self._feeds:
            for name, array in feed.items():
                if array.dtype.kind == "f" and not np.isfinite(array).all():
                    raise DataError(f"the calibration input '{name}' holds NaN or infinity", fix="clean the data")
        self._expected = [run(model, feed) for feed in self._feeds]

    def built(self, steps: Sequence[Step], how: How) -> ir.Model:
        """A graph that the schedule was carried out on."""
        model = self._model.clone()
        blocks = blocks_of(model.graph, follow(model.graph, find_blocks(model.graph)[0].stream).attentions)
        reduce_tokens(model, blocks, steps, how)
        return model

    def of(self, steps: Sequence[Step], how: How) -> float:
        """How far outputs are from those of the whole graph; 0: not at all.

        Of class scores `[B, K]` the divergence KL(whole ‖ reduced) in nats, mean over samples; of other outputs the energy of the
        difference over that of the output.
        """
        model = self.built(steps, how)
        found = [run(model, feed) for feed in self._feeds]
        return float(np.mean([_distance(one[name], other[name]) for one, other in zip(self._expected, found, strict=True) for name in one]))


def _distance(expected: np.ndarray, found: np.ndarray) -> float:
    a, b = expected.astype(np.float64), found.astype(np.float64)
    if a.ndim == 2 and a.shape[1] > 1:
        log_p, log_q = _log_softmax(a), _log_softmax(b)
        return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())
    return float(((a - b) ** 2).sum() / max((a**2).sum(), 1e-30))


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
