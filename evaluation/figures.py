"""Two figures as SVG: lines, and a grid of values between 0 and 1."""

from __future__ import annotations

import math
from html import escape

COLOURS = ("#5b3fd1", "#d1603f", "#2f8f5b", "#b8912a", "#3f7fd1")
TEXT = 'font-family="sans-serif" font-size="12" fill="#333"'


def _text(x: float, y: float, text, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {TEXT}>{escape(str(text))}</text>'


def _document(width: int, height: int, parts: list[str]) -> str:
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">\n{body}\n</svg>\n'


def lines(series: dict[str, list[tuple[float, float]]], title: str, x_name: str, y_name: str) -> str:
    """A line for each name through its points (x, y)."""
    width, height, left, right, top, bottom = 720, 400, 60, 20, 40, 50
    points = [point for line in series.values() for point in line]
    (x0, x1), (y0, y1) = ((min(values), max(values)) for values in ([p[0] for p in points], [p[1] for p in points]))
    step = 10 ** math.floor(math.log10(max(y1 - y0, 1e-6)))
    y0, y1 = math.floor(y0 / step) * step, math.ceil(y1 / step + 1e-9) * step

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x0) / max(x1 - x0, 1e-9) * (width - left - right)
        return across, height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom)

    parts = [_text(width / 2, 22, title), _text(width / 2, height - 10, x_name), _text(left, top - 8, y_name)]
    for i in range(5):
        y = y0 + (y1 - y0) * i / 4
        across, down = place(x0, y)
        parts.append(f'<path d="M{left} {down:.1f}H{width - right}" stroke="#ddd"/>')
        parts.append(_text(across - 6, down + 4, f"{y:.3g}", "end"))
        x = x0 + (x1 - x0) * i / 4
        parts.append(_text(place(x, y0)[0], height - bottom + 18, f"{x:,.0f}"))
    for i, (name, line) in enumerate(series.items()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        colour = COLOURS[i % len(COLOURS)]
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(f'<rect x="{width - 120}" y="{top + 18 * i}" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(width - 104, top + 18 * i + 10, name, "start"))
    return _document(width, height, parts)


def grid(values: list[list[float]], rows: list[str], columns: list[str], title: str, y_name: str, x_name: str) -> str:
    """A cell for each value, red for 0 to green for 1, its number inside."""
    cell, left, top = 64, 90, 60
    width, height = left + cell * len(columns) + 20, top + 32 * len(rows) + 60
    parts = [
        _text(width / 2, 22, title),
        _text(left - 8, top - 10, y_name, "end"),
        _text(width / 2, height - 10, x_name),
    ]
    for i, (name, line) in enumerate(zip(rows, values)):
        parts.append(_text(left - 8, top + 32 * i + 20, name, "end"))
        for j, value in enumerate(line):
            box = f'x="{left + cell * j}" y="{top + 32 * i}" width="{cell - 2}" height="30"'
            parts.append(f'<rect {box} fill="hsl({120 * value:.0f},55%,65%)"/>')
            parts.append(_text(left + cell * j + cell / 2, top + 32 * i + 20, f"{value:.0%}"))
    for j, name in enumerate(columns):
        parts.append(_text(left + cell * j + cell / 2, top + 32 * len(rows) + 18, name))
    return _document(width, height, parts)
