"""A picture of which tokens of an image were kept: the image itself, and beside it what is left of it after each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgekit.contracts import Arrays
from edgekit.graph.token_steps import Tokens, follow_tokens, marks

if TYPE_CHECKING:
    from PIL.Image import Image

_SIDE = 160
"""Pixels of the shorter side of each image, at least."""
_GAP = 8
_IMAGES = 4
_FADED = 0.15
_GONE = (1.0, 0.82, 0.6)
"""Colour of a patch that was dropped, which few images have."""
_PAPER = 255


def token_picture(model: ir.Model, feeds: Sequence[Arrays]) -> Image | None:
    """Draws the tokens of up to four inputs, a row for each; None where tokens are no patches of a square grid of an image.

    A patch that was dropped is faded to orange; patches that were merged have their mean colour. Columns are the input, then the steps in
    order.

    Args:
        model: A graph whose stream of tokens was shortened.
        feeds: Inputs with one image `[B, 1 or 3, H, W]` of floats; the first of each batch is drawn.
    """
    found = marks(model.graph)
    if not found:
        return None
    prefix = next(iter(found.values())).prefix
    rows = []
    for feed in feeds[:_IMAGES]:
        images = [array for array in feed.values() if array.ndim == 4 and array.shape[1] in (1, 3) and array.dtype.kind == "f"]
        if len(images) != 1:
            return None
        history = follow_tokens(model, feed)
        image = _pixels(images[0][0])
        if not history or _side(history[0], prefix, image) is None:
            return None
        rows.append([image, *(_drawn(image, tokens, prefix, _side(history[0], prefix, image) or 1) for tokens in history[1:])])
    return _sheet(rows)


def _pixels(image: np.ndarray) -> np.ndarray:
    """Colours `[H, W, 3]` in 0 to 1 of a normalized image `[C, H, W]`, stretched over its range, enlarged to be seen."""
    finite = np.nan_to_num(image.astype(np.float64))
    span = finite.max() - finite.min()
    scaled = (finite - finite.min()) / (span if span > 0 else 1.0)
    factor = max(1, math.ceil(_SIDE / min(scaled.shape[1:])))
    return np.broadcast_to(scaled, (3, *scaled.shape[1:])).transpose(1, 2, 0).repeat(factor, 0).repeat(factor, 1)


def _side(first: Tokens, prefix: int, image: np.ndarray) -> int | None:
    """Patches along each side."""
    patches = len(first.groups) - prefix
    side = math.isqrt(max(patches, 0))
    return side if side and side * side == patches and not (image.shape[0] % side or image.shape[1] % side) else None


def _drawn(image: np.ndarray, tokens: Tokens, prefix: int, side: int) -> np.ndarray:
    height, width = image.shape[0] // side, image.shape[1] // side
    result = image.copy()

    def patch(original: int) -> tuple[slice, slice]:
        row, column = divmod(original - prefix, side)
        return slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width)

    for group in tokens.groups:
        patches = [patch(original) for original in group if original >= prefix and original not in tokens.dropped]
        if len(patches) > 1:
            colour = np.mean([image[place].mean((0, 1)) for place in patches], axis=0)
            for place in patches:
                result[place] = colour
    for original in tokens.dropped:
        if original >= prefix:
            result[patch(original)] = _FADED * image[patch(original)] + (1 - _FADED) * np.array(_GONE)
    return result


def _sheet(rows: Sequence[Sequence[np.ndarray]]) -> Image:
    from PIL import Image

    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    sheet = np.full((len(rows) * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, 3), _PAPER, np.uint8)
    for number, row in enumerate(rows):
        for column, image in enumerate(row):
            top, left = _GAP + number * (height + _GAP), _GAP + column * (width + _GAP)
            sheet[top : top + height, left : left + width] = np.rint(255 * np.clip(image, 0, 1))
    return Image.fromarray(sheet)
