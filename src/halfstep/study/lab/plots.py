"""Panels of an experiment as pictures: curves on axes in powers of two, bars, number lines."""

from __future__ import annotations

import math

import plotly.graph_objects as go

from halfstep.diagnosis.plots import COLOURS, binary_axis, exponents_between, power, styled
from halfstep.study.lab.results import Curves, Panel, Spans, Ticks

__all__ = ["draw"]

# A format has one colour on every page.
_HUES = {
    "fp32": "#5b6475",
    "bf16": "#c77700",
    "fp16": "#33507a",
    "e6m9": "#0f7b55",
    "e5m2": "#b3261e",
    "e4m3": "#6b4fa0",
    "e4m3fn": "#6b4fa0",
    "e2m1": "#1f8fa3",
    "": "#1d2433",
}
_DASHES = ("solid", "dash", "dashdot", "longdash", "longdashdot")
_THEORY = "dot"
_LEGEND_LINE = 22  # pixels; four names fit on a line of the page
_LINE_OF_FOUR = 4


def draw(panel: Panel) -> go.Figure:
    """The panel as a plotly figure."""
    match panel:
        case Curves():
            return _curves(panel)
        case Spans():
            return _spans(panel)
        case Ticks():
            return _ticks(panel)


def _curves(panel: Curves) -> go.Figure:
    plot = go.Figure()
    seen: dict[str, int] = {}
    for curve in panel.curves:
        colour = _colour(curve.hue, seen)
        dash = _THEORY if curve.theory else _DASHES[seen.get(curve.hue, 0) % len(_DASHES)]
        if not curve.theory:
            seen[curve.hue] = seen.get(curve.hue, 0) + 1
        plot.add_scatter(
            x=list(curve.x),
            y=list(curve.y),
            mode="lines" if curve.theory or len(curve.x) > 40 else "lines+markers",
            marker={"size": 5},
            line={"color": colour, "width": 1.4 if curve.theory else 2, "dash": dash},
            opacity=0.7 if curve.theory else 0.95,
            name=curve.name,
            hovertemplate=f"{curve.name}: %{{y:.4g}} at %{{x:.4g}}<extra></extra>",
        )
    lines = math.ceil(len(panel.curves) / _LINE_OF_FOUR)
    styled(plot, x=panel.x.title, y=panel.y.title, height=400 + _LEGEND_LINE * lines)
    plot.update_layout(margin={"t": 24 + _LEGEND_LINE * lines})
    if panel.x.log:
        binary_axis(plot.update_xaxes, (v for c in panel.curves for v in c.x))
    if panel.y.log:
        binary_axis(plot.update_yaxes, (v for c in panel.curves for v in c.y))
    return plot


def _spans(panel: Spans) -> go.Figure:
    plot = go.Figure()
    for text, colour, ends in (
        (panel.below, "#e0a63a", [(s.low, s.middle) for s in panel.spans]),
        (panel.above, "#2f6db5", [(s.middle, s.high) for s in panel.spans]),
    ):
        # Exponents on a linear axis: a bar on a logarithmic one has no place to start from.
        plot.add_bar(
            y=[span.name for span in panel.spans],
            x=[math.log2(high) - math.log2(low) for low, high in ends],
            base=[math.log2(low) for low, _ in ends],
            orientation="h",
            name=text,
            marker_color=colour,
            customdata=[[f"{low:.4g}", f"{high:.4g}"] for low, high in ends],
            hovertemplate=f"%{{y}}, {text}: %{{customdata[0]}} to %{{customdata[1]}}<extra></extra>",
        )
    plot.update_layout(barmode="overlay")
    plot.update_yaxes(autorange="reversed")
    styled(plot, x=panel.x.title, y="", height=130 + 30 * len(panel.spans))
    ends = [math.log2(end) for span in panel.spans for end in (span.low, span.high)]
    exponents = exponents_between(min(ends), max(ends))
    plot.update_xaxes(tickvals=exponents, ticktext=[power(e) for e in exponents])
    return plot


def _ticks(panel: Ticks) -> go.Figure:
    plot = go.Figure()
    for name, values in panel.rows.items():
        plot.add_scatter(
            x=list(values),
            y=[name] * len(values),
            mode="markers",
            marker={"symbol": "line-ns-open", "size": 16, "color": _colour(name, {})},
            name=name,
            showlegend=False,
            hovertemplate=f"{name}: %{{x:.6g}}<extra></extra>",
        )
    plot.update_yaxes(autorange="reversed")
    return styled(plot, x=panel.x.title, y="", height=110 + 38 * len(panel.rows))


def _colour(hue: str, seen: dict[str, int]) -> str:
    if hue in _HUES:
        return _HUES[hue]
    others = [name for name in seen if name not in _HUES]
    place = others.index(hue) if hue in others else len(others)
    return COLOURS[place % len(COLOURS)]
