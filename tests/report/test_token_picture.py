"""The picture of kept tokens: pixels of small images whose dropped and merged patches are known."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from edgekit.graph.token_steps import Mark, mark
from edgekit.report.token_picture import token_picture


def graph_of(roles: dict[str, list[int]], shape: str = "1,1,4,4", tokens: int = 5) -> ir.Model:
    constants = " ".join(
        f"{role} = Constant <value = int64[1,{len(places)}] {{{', '.join(map(str, places))}}}> ()" for role, places in roles.items()
    )
    text = f'<ir_version: 10, opset_import: ["" : 23]> net (float[{shape}] x) => (float[{shape}] y) {{ {constants} y = Identity(x) }}'
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    for node in model.graph:
        if node.outputs[0].name in roles:
            mark(node.outputs[0], Mark(3, tokens, 1, str(node.outputs[0].name)))
    return model


def panels(model: ir.Model, *images: np.ndarray) -> np.ndarray:
    """The sheet in parts, `[rows, columns, 160, 160, 3]`."""
    picture = token_picture(model, [{"x": image[None, None].astype(np.float32)} for image in images])
    assert picture is not None
    sheet = np.asarray(picture)
    rows, columns = sheet.shape[0] // 168, sheet.shape[1] // 168
    return np.stack([[sheet[8 + 168 * r :, 8 + 168 * c :][:160, :160] for c in range(columns)] for r in range(rows)])


def test_dropped_patches_are_orange_and_others_as_they_were() -> None:
    """A 4×4 image of 2×2 patches: the last two patches stay."""
    first = np.arange(16.0).reshape(4, 4)
    drawn = panels(graph_of({"kept": [2, 3]}), first, first[::-1].copy())
    assert drawn.shape[:2] == (2, 2)
    before, after = drawn[0]
    assert before[0, 0].tolist() == [0, 0, 0]
    assert before[-1, -1].tolist() == [255, 255, 255]
    np.testing.assert_array_equal(after[80:], before[80:])
    red, green, blue = after[:80].reshape(-1, 3).mean(0)
    assert red > green > blue


def test_merged_patches_have_their_mean_colour() -> None:
    """Tokens 0 to 4 with the class token in front: 2 goes into 3, which are the patches 1 (right above) and 2 (left below)."""
    image = np.zeros((4, 4))
    image[:2, 2:], image[2:, :2] = 1.0, 0.5
    before, after = panels(graph_of({"stay": [0, 2], "sources": [1], "targets": [1]}), image)[0]
    assert np.unique(after[:80, 80:]).tolist() == np.unique(after[80:, :80]).tolist() == [191]  # 255 · 0.75
    np.testing.assert_array_equal(after[:80, :80], before[:80, :80])


def test_no_picture_of_what_is_no_square_grid_or_no_image() -> None:
    assert token_picture(graph_of({"kept": [2]}, tokens=4), [{"x": np.zeros((1, 1, 4, 4), np.float32)}]) is None
    assert token_picture(graph_of({"kept": [2]}, "1,4"), [{"x": np.zeros((1, 4), np.float32)}]) is None
    assert token_picture(graph_of({}), [{"x": np.zeros((1, 1, 4, 4), np.float32)}]) is None
