"""Curves on logarithmic axes, side by side, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, LEFT, TOP, ACROSS = 400, 250, 56, 46, 2
_PLOT_W, _PLOT_H, _LABEL_W = 210, 160, 28
_COLOURS = ("#1b6ca8", "#c44536", "#e09f3e", "#3a7d44", "#7b6d8d")


@dataclass(frozen=True)
class Panel:
    """`curves`: for each, milliseconds at each of `sizes`."""

    title: str
    sizes: Sequence[int]
    curves: Mapping[str, Sequence[float]]


def slope(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Between the last two sizes, on logarithms: 1 is proportional, 0 constant."""
    return math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])


# The sheet that a drawing is on, and its words: light, or dark where the page is.
PAPER = """<style>
:root{color-scheme:light dark} .paper{fill:#fff} text:not([fill]){fill:#1f2933}
@media (prefers-color-scheme:dark){.paper{fill:#1e2129} text:not([fill]){fill:#e4e9ee} [stroke="#ddd"]{stroke:#3a424e}}
</style>
<rect class="paper" width="100%" height="100%"/>"""


def draw(panels: Sequence[Panel]) -> str:
    height = HEIGHT * -(-len(panels) // ACROSS)
    body = "\n".join(
        f'<g transform="translate({number % ACROSS * WIDTH} {number // ACROSS * HEIGHT})">\n{_panel(panel)}\n</g>'
        for number, panel in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * ACROSS}" height="{height}" '
        f'font-family="sans-serif" font-size="10">\n{PAPER}\n{body}\n</svg>\n'
    )


def _panel(panel: Panel) -> str:
    values = [value for curve in panel.curves.values() for value in curve]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))

    def x(size: float) -> float:
        first, last = panel.sizes[0], panel.sizes[-1]
        return LEFT + _PLOT_W * math.log(size / first) / math.log(last / first)

    def y(value: float) -> float:
        return TOP + _PLOT_H * (high - math.log10(value)) / max(1, high - low)

    parts = [f'<text x="{LEFT}" y="16" font-weight="bold">{panel.title}</text>', f'<text x="{LEFT}" y="32">ms</text>']
    for decade in range(low, max(high, low + 1) + 1):
        level = y(10.0**decade)
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + _PLOT_W}" y1="{level:.1f}" y2="{level:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{level + 3:.1f}" text-anchor="end">{10.0**decade:g}</text>')
    for size, following in zip(panel.sizes, [*panel.sizes[1:], math.inf], strict=True):
        if following == math.inf or x(following) - x(size) > _LABEL_W:
            parts.append(f'<text x="{x(size):.1f}" y="{TOP + _PLOT_H + 16}" text-anchor="middle">{size}</text>')
    for number, (name, curve) in enumerate(panel.curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        points = [(x(size), y(value)) for size, value in zip(panel.sizes, curve, strict=True)]
        path = " ".join(f"{across:.1f},{down:.1f}" for across, down in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{across:.1f}" cy="{down:.1f}" r="2.5" fill="{colour}"/>' for across, down in points]
        said = f"{name}, slope {slope(panel.sizes, curve):.2f}"
        parts.append(f'<text x="{LEFT + _PLOT_W + 10}" y="{TOP + 12 + number * 16}" fill="{colour}">{said}</text>')
    return "\n".join(parts)
