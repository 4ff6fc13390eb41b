"""A pass from another package: `edgekit compile MODEL --pass drop-relu`."""

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from edgekit import Context, Effect, Pass, register_pass


@register_pass
@dataclass(frozen=True)
class DropRelu(Pass):
    """Drop every Relu after the first `keep`.

    Before:  x ─ Relu ─► y
    After:   x ─► y
    """

    name: ClassVar[str] = "drop-relu"
    effect: ClassVar[Effect] = Effect.APPROXIMATE
    keep: int = 0

    def apply(self, model: ir.Model, context: Context) -> int:
        """Returns the number of Relus that were dropped."""
        nodes = [node for node in model.graph if node.op_type == "Relu"][self.keep :]
        for node in nodes:
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0], replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
        return len(nodes)
