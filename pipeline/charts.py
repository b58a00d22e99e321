"""Charts as SVG text for a page without scripts: columns over an axis, and the bar in a table's cell.

Colours and letters come from the page's style sheet (classes `column`, `grid`, `label`, `pause`, `bar`), so that they
follow light, dark and paper. A chart is a picture with a name; the figures themselves belong in a table beside it.
Knows numbers and labels, not what they mean; every label is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 200  # user units; the page scales it
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 8, 10, 24  # room for the labels
_LABEL_WIDTH = 64  # user units that one label on the x axis needs
_TICKS = 4
_WEE = 0.75  # the height of a column that is not nothing


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its height, what the axis says under it (maybe), what a pointer on it shows."""

    value: float
    label: str
    hint: str


def columns(name: str, data: Sequence[Column], *, at_edges: bool = False, pauses: Collection[int] = (), id: str) -> str:
    """Columns from zero, as an `<svg>` called `name`.

    `at_edges`: labels are of the columns' left edges (bins), not of their middles. `pauses`: columns before which the
    axis leaves something out.
    """
    top = _nice_ceiling([column.value for column in data])
    step = (WIDTH - _LEFT - _RIGHT) / max(1, len(data))
    parts = [_grid(top)]
    free = 0.0  # where the next label may stand
    for i, column in enumerate(data):
        x, height = _LEFT + i * step, (HEIGHT - _TOP - _BOTTOM) * column.value / top
        height = max(height, _WEE) if column.value > 0 else 0.0
        y = HEIGHT - _BOTTOM - height
        parts.append(
            f'<rect class="column" x="{x + step * 0.08:.2f}" y="{y:.2f}" width="{step * 0.84:.2f}"'
            f' height="{height:.2f}"><title>{escape(column.hint)}</title></rect>'
        )
        where = min(x if at_edges else x + step / 2, WIDTH - _LABEL_WIDTH / 2)
        if where >= free:
            parts.append(_label(column.label, where, HEIGHT - 8, "middle"))
            free = where + _LABEL_WIDTH
        if i in pauses:
            parts.append(f'<line class="pause" x1="{x:.2f}" y1="{_TOP}" x2="{x:.2f}" y2="{HEIGHT - _BOTTOM}"/>')
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{escape(id)}">'
        f'<title id="{escape(id)}">{escape(name)}</title>{"".join(parts)}</svg>'
    )


def bar(share: float) -> str:
    """A bar that fills `share` (0 ... 1) of its cell; what it stands for is the number beside it."""
    width = 100 * min(1.0, max(0.0, share))
    return (
        '<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="8"/><rect class="column" width="{width:.1f}" height="8"/></svg>'
    )


def _grid(top: float) -> str:
    lines = []
    for i in range(_TICKS + 1):
        y = HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * i / _TICKS
        lines.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.2f}" x2="{WIDTH - _RIGHT}" y2="{y:.2f}"/>')
        lines.append(_label(f"{top * i / _TICKS:,.10g}", _LEFT - 6, y + 4, "end"))
    return "".join(lines)


def _label(text: str, x: float, y: float, anchor: str) -> str:
    return f'<text class="label" x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}">{escape(text)}</text>'


def _nice_ceiling(values: Sequence[float]) -> float:
    """The next 4, 6, 8, 12, 16 or 20 times a power of ten: each tick is a number one can read; those of counts are
    whole."""
    most, least = max(values, default=0.0), 4.0 if all(float(value).is_integer() for value in values) else 0.0
    if not most > 0:
        return 4.0
    power = 10.0 ** (math.floor(math.log10(most)) - 1)
    return max(least, next(step * power for step in (12, 16, 20, 40, 60, 80, 120) if step * power >= most * (1 - 1e-9)))
