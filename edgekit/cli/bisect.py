"""`edgekit bisect`: the finding as a tree from the stage down to the tensor."""

from __future__ import annotations

import math

from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from edgekit.bisection.finding import Finding
from edgekit.bisection.particulars import Difference


def finding_tree(finding: Finding) -> RenderableType:
    """What a bisection found, each level below the one before it, with the evaluations that it took."""
    parts: list[RenderableType] = []
    if finding.agree:
        stages = f"all {len(finding.stage.stages)} stages agree" if finding.stage is not None else "the two files agree"
        parts.append(Text(f"{finding.model}: {stages}", style="bold"))
    else:
        parts.append(_levels(finding))
    if finding.reproducer is not None:
        shown = "it shows the difference" if finding.reproducer.shows else "it does not show the difference by itself"
        count = f"{finding.reproducer.nodes} node{'s' if finding.reproducer.nodes != 1 else ''}"
        parts.append(Text(f"written to {finding.reproducer.path} ({count}): {shown}"))
    parts += _remedies(finding)
    parts += [Text(f"note: {note}", style="yellow") for note in finding.notes]
    return Group(*parts)


def _levels(finding: Finding) -> Tree:
    root = branch = Tree(Text(finding.model, style="bold"))
    stage, rewrite, node, tensor = finding.stage, finding.rewrite, finding.node, finding.tensor
    if stage is not None:
        branch = branch.add(_line("stage", stage.name, f"{len(stage.stages)} stages", stage.evaluations, stage.bound))
        branch.add(Text(stage.why, style="dim"))
    if rewrite is not None and rewrite.places:
        for place, evaluations in zip(rewrite.places, rewrite.evaluations, strict=False):
            line = _line("rewrite", place, f"{rewrite.count} places", evaluations, rewrite.bound)
            below = branch.add(line)
        branch.add(Text(_completeness(len(rewrite.places), rewrite.complete), style="dim"))
        branch = below
    elif rewrite is not None:
        branch.add(Text(f"rewrite: {rewrite.why_not}", style="dim"))
    if node is not None:
        where = f"{node.node.name} ({node.node.op_type})" + (f" of module {node.module}" if node.module else "")
        branch = branch.add(_line("node", where, "", node.evaluations, node.bound))
        if len(node.region) > 1:
            branch.add(Text(f"together with {', '.join(str(other.name) for other in node.region if other is not node.node)}", style="dim"))
        if node.alone is not None:
            branch.add(
                Text("alone it is wrong too" if node.alone else "alone it is right: it is wrong after the nodes before it", style="dim")
            )
    if tensor is not None:
        text = Text("tensor   ", style="dim")
        text.append(f"{tensor.role} {tensor.name}", style="bold")
        text.append(f": {tensor.text}" if tensor.text else "")
        branch = branch.add(text)
        if tensor.difference is not None and tensor.difference.index:
            branch.add(Text(_worst(tensor.difference), style="dim"))
    return root


def _line(level: str, name: str, among: str, evaluations: int, bound: int) -> Text:
    text = Text(f"{level:<9}", style="dim")
    text.append(name, style="bold not dim")
    text.append(f"  {among + ', ' if among else ''}{evaluations} of at most {bound} evaluations")
    return text


def _completeness(count: int, complete: bool) -> str:
    if complete:
        return "without it the graph is good" if count == 1 else f"without these {count} the graph is good"
    without = "it" if count == 1 else f"these {count}"
    return f"there are more culprits, or the error is spread over many places: without {without} the graph is still bad"


def _worst(found: Difference) -> str:
    channel = "" if found.channel is None or (math.isnan(found.expected) and math.isnan(found.found)) else f", channel {found.channel}"
    return f"worst at {list(found.index)}{channel}: {found.found:.7g} instead of {found.expected:.7g}"


def _remedies(finding: Finding) -> list[RenderableType]:
    if finding.agree or (finding.stage is None and not finding.remedies):
        return []
    lines: list[RenderableType] = []
    for tried in finding.remedies:
        result = "works" if tried.works else f"does not help ({tried.why})" if tried.why else "does not help"
        style = "bold green" if tried.works else "dim"
        lines.append(Text(f"remedy: {tried.remedy.text}: {tried.remedy.options} (tried: {result})", style=style))
    if finding.remedy is None:
        lines.append(Text("no remedy that was tried works" if lines else "there is no remedy to try at this stage", style="yellow"))
    return lines
