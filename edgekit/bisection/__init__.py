"""`edgekit bisect`: from two stages that disagree to the pass, the rewrite, the node and the tensor that made them."""
