"""Networks exported by PyTorch, by both exporters and at several opsets, against PyTorch."""

import io
import logging
from collections.abc import Callable

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgekit.graph.interpreter import Interpreter

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Wrapped(nn.Module):
    """A function of the input and, perhaps, a module."""

    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parts)


IMAGE, SEQUENCE = (2, 8, 12, 10), (2, 7, 16)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lstm": (lambda: Wrapped(lambda x, m: m(x)[0], nn.LSTM(16, 5, 2, batch_first=True, bidirectional=True)), SEQUENCE),
    "gru": (lambda: Wrapped(lambda x, m: m(x)[0], nn.GRU(16, 5, batch_first=True)), SEQUENCE),
    "attention": (lambda: Wrapped(lambda x, m: m(x, x, x)[0], nn.MultiheadAttention(16, 4, batch_first=True)), SEQUENCE),
    "group-norm": (lambda: nn.GroupNorm(4, 8), IMAGE),
    "bicubic": (lambda: Wrapped(lambda x: functional.interpolate(x, size=(30, 7), mode="bicubic")), IMAGE),
    "bilinear": (lambda: Wrapped(lambda x: functional.interpolate(x, scale_factor=1.7, mode="bilinear")), IMAGE),
    "transposed": (lambda: nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1, groups=2), IMAGE),
    "pool": (lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), IMAGE),
    "shifts": (lambda: Wrapped(lambda x: functional.pixel_shuffle(torch.roll(x, (1, -2), (2, 3)), 2).flip(-1)), IMAGE),
}


@pytest.mark.parametrize(("dynamo", "opset"), [(False, 13), (False, 17), (True, 18), (True, 23)])
@pytest.mark.parametrize("name", NETWORKS)
def test_exported(name: str, dynamo: bool, opset: int) -> None:
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    module, x = build().eval(), torch.randn(shape)
    logging.disable(logging.WARNING)
    try:
        if dynamo:
            program = torch.onnx.export(module, (x,), dynamo=True, opset_version=opset, verbose=False)
            assert program is not None
            model = program.model
        else:
            file = io.BytesIO()
            torch.onnx.export(module, (x,), file, dynamo=False, opset_version=opset)
            model = ir.from_proto(onnx.load_from_string(file.getvalue()))
    finally:
        logging.disable(logging.NOTSET)
    interpreter = Interpreter(model)
    with torch.no_grad():
        result = interpreter({interpreter.input_names[0]: x})[interpreter.output_names[0]]
        torch.testing.assert_close(result, module(x), rtol=1e-4, atol=1e-5)
