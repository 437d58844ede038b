"""``drop-dead``: remove nodes that do nothing in inference, and modules that are never called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from tdcompile.core.passes import RewritePass, Rewritten
from tdcompile.ir.graph_edits import drop_node, module_at
from tdcompile.ir.modules import called_differently
from tdcompile.ir.program import Change, Program

_IDLE = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


@dataclass(frozen=True)
class DropDead(RewritePass):
    """Remove identities, dropout, unused values and unused modules."""

    name: ClassVar[str] = "drop-dead"
    lowering: ClassVar[int] = 2  # folding leaves dead nodes

    def rewrite(self, graph: fx.GraphModule, program: Program) -> Rewritten:
        """Remove them; the function in eval mode does not change."""
        history = []
        for node in list(graph.graph.nodes):
            module = module_at(graph, node)
            if isinstance(module, _IDLE) and not called_differently(module):
                history.append(Change(str(node.target), self.name, "does nothing in inference"))
                drop_node(graph, node)
        graph.graph.eliminate_dead_code()
        graph.delete_all_unused_submodules()
        return Rewritten(graph, history)
