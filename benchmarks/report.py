"""Tables of a run's figures, and the part of docs/benchmarks.md that a run writes."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path

from benchmarks.shapes import SHAPES

Results = Mapping[str, Mapping[str, list[float]]]

COLUMNS = ("blocked", "durable", "restore", "other mesh", "one process")
MARKS = ("<!-- figures: written by `make bench` -->", "<!-- end of figures -->")


def table(shape: str, results: Results) -> str:
    """Markdown: medians (and ranges) in milliseconds, memory over the state's bytes, bytes on disk."""
    rounds = len(next(iter(results.values()))["durable"])
    header = ["median ms (min to max)", *COLUMNS, "peak save", "peak restore", "MiB on disk"]
    lines = [f"**{SHAPES[shape].title}**, {rounds} rounds", "", _row(header), _row(["---"] * len(header))]
    for name, figures in results.items():
        cells = [_times(figures.get(column, [])) for column in COLUMNS]
        # Of a few kilobytes of state, memory says nothing.
        sized = [
            figures.get(column, []) if _has_memory(shape, name) else [] for column in ("peak save", "peak restore")
        ]
        peaks = [_median(values, "{:.2f}x") for values in sized]
        disk = _median([value / (1 << 20) for value in figures.get("bytes on disk", [])], "{:.1f}")
        lines.append(_row([name, *cells, *peaks, disk]))
    lines += ["", _ratios(results), ""]
    return "\n".join(lines)


def _has_memory(shape: str, name: str) -> bool:
    return shape != "leaves" and name != "raw limit"


def _ratios(results: Results) -> str:
    """How many times ours each peer needs, and ours of the raw limit."""
    said = []
    for name, figures in results.items():
        if name == "ours":
            continue
        parts = [
            f"{column} {statistics.median(figures[column]) / statistics.median(results['ours'][column]):.1f}x"
            for column in COLUMNS
            if figures.get(column) and results["ours"].get(column) and (name != "raw limit" or column != "blocked")
        ]
        if name == "raw limit":
            parts = [
                f"{column} {statistics.median(results['ours'][column]) / statistics.median(figures[column]):.2f}x"
                for column in ("durable", "restore")
            ]
            said.append("ours / raw limit: " + ", ".join(parts))
        else:
            said.append(f"{name} / ours: " + ", ".join(parts))
    return "  \n".join(said)


def _times(values: list[float]) -> str:
    if not values:
        return ""
    low, middle, high = (value * 1000 for value in (min(values), statistics.median(values), max(values)))
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"


def _median(values: list[float], form: str) -> str:
    return form.format(statistics.median(values)) if values else ""


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write(directory: str, results: Mapping[str, Results]) -> None:
    """Into `directory`: the figures as they are (`benchmarks.json`; of shapes not in `results`, the earlier ones), the
    tables between the marks of `benchmarks.md`, and the plot."""
    raw = Path(directory) / "benchmarks.json"
    earlier = json.loads(raw.read_text()) if raw.exists() else {}
    every: dict[str, dict[str, dict[str, list[float]]]] = {}
    for shape in (shape for shape in SHAPES if shape in results or shape in earlier):
        for source in (earlier.get(shape, {}), results.get(shape, {})):
            for name, figures in source.items():
                every.setdefault(shape, {}).setdefault(name, {}).update(figures)
    raw.write_text(json.dumps(_rounded(every), indent=1) + "\n")
    page = Path(directory) / "benchmarks.md"
    before, _, rest = page.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    tables = "\n".join(table(shape, figures) for shape, figures in every.items())
    page.write_text(f"{before}{MARKS[0]}\n\n{tables}\n{MARKS[1]}{after}")
    (Path(directory) / "benchmarks.svg").write_text(plot(every))


def _rounded(results: Mapping[str, Results]) -> dict[str, dict[str, dict[str, list[float]]]]:
    return {
        shape: {
            name: {column: [round(value, 5) for value in values] for column, values in figures.items()}
            for name, figures in peers.items()
        }
        for shape, peers in results.items()
    }


_COLOURS = ("#1b6ca8", "#c44536", "#e09f3e", "#7b6d8d", "#a5a58d", "#8a8a8a")
_BAR, _GAP, _SCALE = 14, 26, 560


def plot(results: Mapping[str, Results]) -> str:
    """Bars of the medians: time until durable and time to restore of each peer, each shape to its own scale."""
    parts, y = [], 20
    for shape, figures in results.items():
        for column in ("durable", "restore"):
            medians = {name: statistics.median(had[column]) for name, had in figures.items() if had.get(column)}
            longest = max(medians.values())
            parts.append(f'<text x="10" y="{y}" font-weight="bold">{SHAPES[shape].title}: {column}</text>')
            y += 8
            for number, (name, seconds) in enumerate(medians.items()):
                width = max(1.0, seconds / longest * _SCALE)
                colour = _COLOURS[number % len(_COLOURS)]
                parts.append(f'<rect x="130" y="{y}" width="{width:.1f}" height="{_BAR - 3}" fill="{colour}"/>')
                parts.append(f'<text x="124" y="{y + 9}" text-anchor="end">{name}</text>')
                parts.append(f'<text x="{134 + width:.1f}" y="{y + 9}">{seconds * 1000:.0f} ms</text>')
                y += _BAR
            y += _GAP
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="770" height="{y}" font-family="sans-serif" font-size="11">'
        f'\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )
