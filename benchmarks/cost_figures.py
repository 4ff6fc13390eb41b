"""Compares counted parameters and MACs of published networks with the figures of their papers.

    python -m benchmarks.cost_figures [NAME ...]

Each network is made by timm with random weights, traced, brought to the canonical form and counted by `edgekit.graph.cost`. Prints
counted, published and their ratio; the exit status is 1 where a ratio is off by more than 1 %. The published figures count a
multiply-accumulate once, the two matrix products of attention included and elementwise operators left out.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from edgekit.graph.canonicalize import canonicalize
from edgekit.graph.cost import Cost, cost
from edgekit.graph.shapes import infer_shapes
from edgekit.source import Source
from edgekit.trace import trace
from tests.timm_support import create_timm

GOAL = 0.01


@dataclass(frozen=True)
class Figure:
    """What a paper, or timm's table of results, says of a network.

    Attributes:
        network: Its name in timm.
        parameters: Number of parameters, None where the paper gives none.
        macs: Multiply-accumulates for one image, None where the paper gives none.
        merged: Whether the figures are of the network with its training-time branches merged (by timm).
        source: Where the figures stand.
    """

    network: str
    parameters: float
    macs: float | None
    merged: bool = False
    source: str = ""


FIGURES = {
    "swin_tiny_patch4_window7_224": Figure("swin_tiny_patch4_window7_224", 28.29e6, 4.49e9, source="Liu et al. 2021; timm"),
    "convnext_tiny": Figure("convnext_tiny", 28.59e6, 4.46e9, source="Liu et al. 2022; timm"),
    "crossvit_15_240": Figure("crossvit_15_240", 27.53e6, 5.79e9, source="Chen et al. 2021; timm"),
    "deit_small_patch16_224": Figure("deit_small_patch16_224", 22.05e6, 4.6e9, source="Touvron et al. 2021; timm"),
    "resnet50": Figure("resnet50", 25.56e6, 4.1e9, source="He et al. 2016; torchvision"),
    "mobileone_s0": Figure("mobileone_s0", 5_293_272, None, source="Vasu et al. 2023, code"),
    "mobileone_s0 merged": Figure("mobileone_s0", 2_078_504, 0.275e9, merged=True, source="Vasu et al. 2023, code"),
}


def count(figure: Figure) -> Cost:
    """Traces and counts the network of `figure`."""
    module, example = create_timm(figure.network)
    if figure.merged:
        from timm.utils import reparameterize_model

        module = reparameterize_model(module)
    graph = canonicalize(trace(Source(figure.network, module=module, example_inputs=(example,)), "dynamo").model)
    infer_shapes(graph)
    return cost(graph)


def ratios(figure: Figure, counted: Cost) -> list[tuple[str, float, float]]:
    """Returns the name, the counted and the published number of everything that was published."""
    found = [("parameters", float(counted.parameters), float(figure.parameters))]
    if figure.macs is not None:
        found.append(("MACs", float(counted.macs), figure.macs))
    return found


def main() -> int:
    """Prints the table; the exit status is 1 where a figure is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(FIGURES), help=f"of: {', '.join(FIGURES)}")
    names = parser.parse_args().names
    if unknown := [name for name in names if name not in FIGURES]:
        parser.error(f"unknown network '{unknown[0]}'")
    missed = 0
    print(f"{'network':<30}{'figure':<12}{'counted':>15}{'published':>15}{'ratio':>9}  source")
    for name in names:
        figure = FIGURES[name]
        counted = count(figure)
        for what, number, published in ratios(figure, counted):
            missed += abs(number / published - 1) > GOAL or not counted.complete
            print(f"{name:<30}{what:<12}{number:>15,.0f}{published:>15,.0f}{number / published:>9.4f}  {figure.source}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
