"""A picture of where a step's time goes: one HTML file with icicle charts in SVG, that loads nothing and runs nothing.

Width is time; what a module calls hangs below it; what hangs below nothing is its own. After the flame graphs of B. Gregg,
"The Flame Graph", CACM 59(6), 2016."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from zlib import crc32

from kernel_profiling.records import Step
from kernel_profiling.tables import Node, by_kind, step_tree

WIDTH, ROW, NARROWEST, LETTER = 1400.0, 20, 0.4, 6.6
STYLE = (
    "body{font:14px system-ui,sans-serif;margin:24px;color:#222;background:#fff}"
    "h1{font-size:20px}h2{font-size:16px;margin:28px 0 4px}p{margin:4px 0 10px;color:#555}"
    "svg{width:100%;height:auto;display:block}text{font:11px ui-monospace,monospace;fill:#111;pointer-events:none}"
    "rect{stroke:#fff;stroke-width:.6}rect:hover{stroke:#000;stroke-width:1.2}"
)


def html_page(steps: Sequence[Step], title: str) -> str:
    """Per kind of step one chart with the layers merged and one with every layer."""
    parts = [section for kind, found in by_kind(steps).items() for section in _sections(kind, found)]
    body = "".join(parts) or "<p>No step ran.</p>"
    name = escape(f"Profile: {title}")
    head = f'<meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body><h1>{name}</h1>{body}</body></html>\n'


def _sections(kind: str, steps: Sequence[Step]) -> Iterator[str]:
    rows, tokens = (sum(values) / len(steps) for values in zip(*((step.rows, step.tokens) for step in steps)))
    for merge, what in ((True, "layers together"), (False, "every layer")):
        tree = step_tree(steps, merge)
        about = f"mean of {len(steps)} steps: {_duration(tree.device / len(steps))}, {rows:.1f} rows, {tokens:.1f} tokens"
        yield f"<h2>{escape(kind)}, {what}</h2><p>{about}</p>{_svg(tree, len(steps))}"


def _svg(root: Node, steps: int) -> str:
    boxes = list(_boxes(root, 0.0, WIDTH / (root.device or 1.0), 0))
    height = ROW * (1 + max(depth for *_, depth in boxes))
    drawn = "".join(_box(node, x, width, depth, root, steps) for node, x, width, depth in boxes)
    return f'<svg viewBox="0 0 {WIDTH:.0f} {height}" role="img">{drawn}</svg>'


def _boxes(node: Node, x: float, scale: float, depth: int) -> Iterator[tuple[Node, float, float, int]]:
    """(node, x, width, depth) of everything that is wide enough to see; children from left to right."""
    width = node.device * scale
    if width < NARROWEST and depth:
        return
    yield node, x, width, depth
    inside = sum(child.device for child in node.children.values())
    inner = scale * min(1.0, node.device / inside) if inside else scale
    for child in node.children.values():
        yield from _boxes(child, x, inner, depth + 1)
        x += child.device * inner


def _box(node: Node, x: float, width: float, depth: int, root: Node, steps: int) -> str:
    share = 100 * node.device / (root.device or 1.0)
    text = f"{node.name} ({node.type}) " if node.type else f"{node.name} "
    told = f"{text}{_duration(node.device / steps)} a step, {share:.1f} %, own {_duration(node.own / steps)}, {node.calls} calls"
    letters = int((width - 6) / LETTER)
    label = node.name if len(node.name) <= letters else "…" + node.name[-(letters - 1) :] if letters >= 4 else ""
    y = depth * ROW
    shown = f'<text x="{x + 3:.1f}" y="{y + 14}">{escape(label)}</text>' if label else ""
    shape = f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{ROW - 1}" fill="{_colour(node)}">'
    return f"<g>{shape}<title>{escape(told)}</title></rect>{shown}</g>"


def _colour(node: Node) -> str:
    """The same for the same type of module."""
    hue = crc32((node.type or node.name).encode()) % 360
    return f"hsl({hue},{25 if node.type == 'phase' else 62}%,{78}%)"


def _duration(micros: float) -> str:
    return f"{micros / 1e3:.2f} ms" if micros >= 1e3 else f"{micros:.0f} µs"
