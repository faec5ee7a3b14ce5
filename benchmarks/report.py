"""Tables of a run's figures, and the parts of docs/benchmarks.md (medians) and docs/benchmark-tables.md (all) that runs
write."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.curves import PAPER
from benchmarks.figures import RESTORES, TIMES
from benchmarks.peers import PEERS
from benchmarks.shapes import SHAPES

Results = Mapping[str, Mapping[str, list[float]]]

COLUMNS = TIMES
SUMMARY, TABLES = "benchmarks.md", "benchmark-tables.md"
BOUND_RATIO, BOUND_S = 1.2, 0.020  # what `blocked` may be of one memcpy, and beyond it


def table(shape: str, results: Results) -> str:
    """Markdown: medians (and ranges) in milliseconds, memory over the state's bytes, bytes on disk."""
    results = {name: results[name] for name in PEERS if name in results}
    rounds = len(next(iter(results.values()))["durable"])
    header = ["median ms (min to max)", *COLUMNS, "peak save", "peak restore", "MiB on disk"]
    lines = [f"**{SHAPES[shape].title}**, {rounds} rounds", "", row(header), row(["---"] * len(header))]
    for name, figures in results.items():
        cells = [times(figures.get(column, [])) for column in COLUMNS]
        if "memcpy" in figures:  # of the raw limit, being blocked means no more
            cells[0] = f"memcpy {times(figures['memcpy'])}"
        sized = [
            figures.get(column, []) if _has_memory(shape, name) else [] for column in ("peak save", "peak restore")
        ]
        peaks = [median(values, "{:.2f}x") for values in sized]
        disk = median([value / (1 << 20) for value in figures.get("bytes on disk", [])], "{:.1f}")
        lines.append(row([name, *cells, *peaks, disk]))
    said = [*_ratios(results), *_bound(results)]
    return "\n".join([*lines, "", "  \n".join(said), "", *_amplification(results), ""])


def summary(every: Mapping[str, Results]) -> str:
    """Markdown: medians of all shapes, one table for saves and one for restores."""
    return "\n".join(
        [
            "Saving: milliseconds until the step is durable (in parentheses: how long `save` blocks training)",
            "",
            *_medians(every, lambda had: _both(had, "durable", "blocked")),
            "",
            "Restoring: milliseconds onto the same mesh / onto another mesh / in one process",
            "",
            *_medians(every, lambda had: " / ".join(_median_ms(had, column) or "-" for column in RESTORES)),
            "",
        ]
    )


def _medians(every: Mapping[str, Results], cell: Callable[[Mapping[str, list[float]]], str]) -> list[str]:
    """A row for each shape, a column for each peer that was restored and saved in all of them."""
    peers = [name for name in PEERS if all("durable" in results.get(name, {}) for results in every.values())]
    rows = [row([SHAPES[shape].title, *(cell(results[name]) for name in peers)]) for shape, results in every.items()]
    return [row(["state", *peers]), row(["---"] * (len(peers) + 1)), *rows]


def _both(had: Mapping[str, list[float]], first: str, second: str) -> str:
    # Of the raw limit, being blocked means no more than a memcpy, which is in the full table.
    return _median_ms(had, first) + (f" ({_median_ms(had, second)})" if "memcpy" not in had else "")


def _median_ms(had: Mapping[str, list[float]], column: str) -> str:
    return _ms(statistics.median(had[column])) if had.get(column) else ""


def _has_memory(shape: str, name: str) -> bool:
    return SHAPES[shape].peaks and name != "raw limit"


def _ratios(results: Results) -> list[str]:
    """How many times ours each peer needs, and ours of the raw limit."""
    said: list[str] = []
    if "ours" not in results:
        return said
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
    return said


def _bound(results: Results) -> list[str]:
    """Whether ours blocks no longer than a copy of the bytes would take."""
    memcpy, blocked = results.get("raw limit", {}).get("memcpy"), results.get("ours", {}).get("blocked")
    if not memcpy or not blocked:
        return []
    allowed = BOUND_RATIO * statistics.median(memcpy) + BOUND_S
    verdict = "within" if statistics.median(blocked) <= allowed else "**above**"
    bound = f"{BOUND_RATIO} x one memcpy of the process's bytes + {_ms(BOUND_S)} ms = {_ms(allowed)} ms"
    return [f"ours blocked {_ms(statistics.median(blocked))} ms: {verdict} {bound}"]


def _amplification(results: Results) -> list[str]:
    """What a process read over what it needed; for ours also as its events say."""
    rows = []
    for name, figures in results.items():
        for label, kind in ((name, "read"), (f"{name}, by its events", "reported")):
            cells = [median(figures.get(f"{column} {kind}", []), "{:.2f}x") for column in RESTORES]
            if any(cells):
                rows.append(row([label, *cells]))
    header = ["bytes read / bytes needed", *RESTORES]
    return [row(header), row(["---"] * len(header)), *rows] if rows else []


def times(values: list[float]) -> str:
    if not values:
        return ""
    low, middle, high = (_ms(value) for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f}"


def median(values: list[float], form: str) -> str:
    return form.format(statistics.median(values)) if values else ""


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write(directory: str, results: Mapping[str, Results]) -> None:
    """Into `directory`: the figures (`benchmarks.json`; of shapes not in `results`, the earlier ones stay), their
    medians into `benchmarks.md`, all tables into `benchmark-tables.md`, and the plot."""
    raw = Path(directory) / "benchmarks.json"
    earlier = json.loads(raw.read_text()) if raw.exists() else {}
    every = {shape: results.get(shape) or earlier[shape] for shape in SHAPES if shape in results or shape in earlier}
    raw.write_text(json.dumps(_rounded(every), indent=1) + "\n")
    put(directory, "make bench", "\n".join(table(shape, figures) for shape, figures in every.items()))
    put(directory, "make bench", summary(every), SUMMARY)
    (Path(directory) / "benchmarks.svg").write_text(plot(every))


def put(directory: str, command: str, tables: str, name: str = TABLES) -> None:
    """Into the page `name`, between the marks of `command`."""
    page, marks = (
        Path(directory) / name,
        (f"<!-- figures: written by `{command}` -->", "<!-- end of figures -->"),
    )
    before, found, rest = page.read_text().partition(marks[0])
    _, ended, after = rest.partition(marks[1])
    if not found or not ended:
        raise SystemExit(f"{page}: no place for the tables ({marks[0]} and {marks[1]}); nothing written to it")
    page.write_text(f"{before}{marks[0]}\n\n{tables}\n{marks[1]}{after}")


def _rounded(results: Mapping[str, Results]) -> dict[str, dict[str, dict[str, list[float]]]]:
    return {
        shape: {
            name: {column: [round(value, 5) for value in values] for column, values in figures.items()}
            for name, figures in peers.items()
        }
        for shape, peers in results.items()
    }


_COLOURS = ("#1b6ca8", "#c44536", "#e09f3e", "#7b6d8d", "#a5a58d", "#3a7d44", "#9c6644", "#8a8a8a")
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
        f"\n{PAPER}\n{body}\n</svg>\n"
    )
