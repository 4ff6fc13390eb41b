"""Inputs that take an image: pixels of 0–255, which Core ML itself scales and shifts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgekit.errors import UsageError

COLOURS = {"RGB": 3, "BGR": 3, "GRAYSCALE": 1}
"""Channels of each colour layout."""
_FORM = "NAME:SCALE,BIAS,COLOUR such as image:0.00392157,0,RGB or image:0.0171,-2.12/-2.04/-1.80,BGR"


@dataclass(frozen=True)
class ImageInput:
    """An input of the graph that becomes an image.

    The graph is given `scale · pixel + bias`, so its own normalization goes into these numbers.

    Attributes:
        name: Name of the input in the ONNX graph.
        scale: What every pixel is multiplied by.
        bias: What is added after that: one number per channel.
        colour: Layout of the channels: RGB, BGR or GRAYSCALE.
    """

    name: str
    scale: float
    bias: tuple[float, ...]
    colour: str


def parse_images(texts: Sequence[str]) -> tuple[ImageInput, ...]:
    """Reads image inputs as the command line takes them: `NAME:SCALE,BIAS,COLOUR`, three biases joined by `/`.

    Raises:
        UsageError: One is not of that form.
    """
    return tuple(_parse(text) for text in texts)


def _parse(text: str) -> ImageInput:
    name, colon, rest = text.rpartition(":")
    parts = rest.split(",")
    if not name or not colon or len(parts) != 3:
        raise UsageError(f"'{text}' describes no image input", where="--image-input", fix=f"write {_FORM}")
    colour = parts[2].strip().upper()
    if colour not in COLOURS:
        raise UsageError(f"'{parts[2]}' is no layout of colours", where=f"--image-input {text}", fix="RGB, BGR or GRAYSCALE")
    try:
        scale, bias = float(parts[0]), tuple(float(number) for number in parts[1].split("/"))
    except ValueError as error:
        raise UsageError(f"'{text}' has a scale or bias that is no number", where="--image-input", fix=f"write {_FORM}") from error
    if not (math.isfinite(scale) and scale != 0 and all(map(math.isfinite, bias))):
        raise UsageError(
            f"'{text}' has a scale or bias that no pixel can have",
            where="--image-input",
            fix="give finite numbers, and a scale that is not 0",
        )
    if len(bias) not in (1, COLOURS[colour]):
        raise UsageError(
            f"'{text}' has {len(bias)} biases", where="--image-input", fix=f"give one, or one for each of the {COLOURS[colour]} channels"
        )
    return ImageInput(name, scale, bias * COLOURS[colour] if len(bias) == 1 else bias, colour)
