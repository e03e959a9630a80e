"""Pictures of what a probe saw: binades against a format's reach, bytes, shares over training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from halfstep.diagnosis.footprint import Footprint
from halfstep.diagnosis.statistics import Exponents, Reach

__all__ = [
    "COLOURS",
    "binades",
    "binary_axis",
    "bytes_held",
    "exponents_between",
    "lines",
    "loss_by_scale",
    "percent",
    "points_with_means",
    "power",
    "styled",
]

_MOST_TICKS = 11
COLOURS = ("#33507a", "#0f7b55", "#b3261e", "#c77700", "#6b4fa0", "#5b6475")
_DASHES = ("solid", "dash", "dot")  # curves that lie on each other must all be seen
_LOST, _SUBNORMAL, _NORMAL = "#b3261e", "#e0a63a", "#2f6db5"


def power(exponent: int) -> str:
    """2 to the ``exponent``, set as text.

    >>> power(-24)
    '2⁻²⁴'
    """
    return "2" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def binary_axis(update: Callable[..., Any], values: Iterable[float]) -> None:
    """A logarithmic axis marked in powers of two; ``update`` is a figure's update_xaxes or update_yaxes."""
    positive = [value for value in values if value > 0]
    if not positive:
        return
    low, high = math.log2(min(positive)), math.log2(max(positive))
    exponents = exponents_between(low, high)
    margin = 0.04 * (high - low) or 0.5
    update(
        type="log",
        tickvals=[2.0**e for e in exponents],
        ticktext=[power(e) for e in exponents],
        # plotly counts a logarithmic axis in powers of ten
        range=[(low - margin) * math.log10(2), (high + margin) * math.log10(2)],
    )


def exponents_between(low: float, high: float) -> list[int]:
    """Whole exponents from ``low`` to ``high``, a power of two apart, few enough to be read."""
    step = 1
    while (high - low) / step > _MOST_TICKS:
        step *= 2
    return list(range(math.ceil(low / step) * step, math.floor(high) + 1, step))


def percent(share: float) -> str:
    """A share in percent as text; what is too small to matter is said to be so.

    >>> percent(16.1), percent(0.0), percent(1.6e-6)
    ('16.1%', '0%', '<0.001%')
    """
    return "<0.001%" if 0 < share < 0.001 else f"{share:.3g}%"


def styled(plot: go.Figure, *, x: str, y: str, height: int = 380) -> go.Figure:
    """``plot`` in the page's style, with titles of its axes."""
    plot.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 64, "r": 20, "t": 24, "b": 52},
        font={"family": "system-ui, 'DejaVu Sans', sans-serif", "size": 13, "color": "#1d2433"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hoverlabel={"namelength": -1},
    )
    plot.update_xaxes(title_text=x, automargin=True)
    plot.update_yaxes(title_text=y, automargin=True)
    return plot


def binades(seen: Exponents, to: Reach, *, scale: int) -> go.Figure:
    """Histogram of the binades in ``seen``, coloured by what ``to`` makes of them, and as 2^scale
    shifts them.

    Shares are of non-zero values: zeros are no loss.
    """
    low, high = min(seen.bins, default=-30), max(seen.bins, default=0)
    exponents = list(range(low, high + 1))
    shares = [100 * seen.bins.get(e, 0) / max(1, seen.nonzero) for e in exponents]
    colours = [
        _LOST if e + 1 < to.smallest else _SUBNORMAL if e < to.normal else _NORMAL
        for e in exponents
    ]
    plot = go.Figure()
    plot.add_bar(
        x=exponents,
        y=shares,
        marker_color=colours,
        showlegend=False,
        hovertemplate="2^%{x}: %{y:.3f}% of non-zero gradients<extra></extra>",
    )
    plot.add_scatter(
        x=[e + scale for e in exponents],
        y=shares,
        mode="lines",
        line={"shape": "hvh", "color": "#1d2433", "width": 1.6, "dash": "dot"},
        name=f"multiplied by the loss scale {power(scale)}",
        hovertemplate="2^%{x}: %{y:.3f}%<extra></extra>",
    )
    top = max(shares, default=1.0) * 1.18
    left = min(low, to.smallest) - 1.5
    for start, end, text, colour in (
        (left, to.smallest - 1.5, "below: becomes 0", _LOST),
        (to.smallest - 1.5, to.normal - 0.5, "subnormal: fewer bits", _SUBNORMAL),
        (to.normal - 0.5, to.largest + 0.5, "FP16's normal range", _NORMAL),
    ):
        plot.add_vrect(x0=start, x1=end, fillcolor=colour, opacity=0.07, line_width=0)
        plot.add_annotation(
            x=(start + end) / 2,
            y=top,
            text=text,
            showarrow=False,
            font={"color": colour, "size": 12},
        )
    plot.update_xaxes(range=[left, max(to.largest + 1, high + scale + 1)], dtick=4, zeroline=False)
    plot.update_yaxes(range=[0, top * 1.06], ticksuffix="%")
    return styled(plot, x="exponent of the gradient (power of two)", y="share of non-zero values")


def loss_by_scale(seen: Mapping[str, Exponents], to: Reach, *, chosen: int) -> go.Figure:
    """Share of non-zero values that ``to`` rounds to zero, against the exponent of the
    loss scale.
    """
    scales = list(range(0, 25))
    plot = go.Figure()
    for (name, exponents), colour in zip(seen.items(), COLOURS, strict=False):
        plot.add_scatter(
            x=scales,
            y=[exponents.lost_share(to, scale=scale) for scale in scales],
            mode="lines+markers",
            name=name,
            line={"color": colour},
            hovertemplate="2^%{x}: %{y:.4f}% lost<extra></extra>",
        )
    plot.add_vline(
        x=chosen, line_dash="dot", annotation_text="the dynamic scale's last", line_color="#5b6475"
    )
    plot.update_yaxes(ticksuffix="%", rangemode="tozero")
    return styled(
        plot, x="loss scale (power of two)", y="non-zero values that become 0", height=320
    )


def lines(
    series: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]],
    *,
    x: str,
    y: str,
    colours: Mapping[str, str],
) -> go.Figure:
    """Curves by name, several of a kind (seeds) in one colour, the first of them named in the
    legend.
    """
    plot = go.Figure()
    for (name, curves), dash in zip(series.items(), itertools.cycle(_DASHES), strict=False):
        colour = colours.get(name, COLOURS[0])
        for index, (abscissae, ordinates) in enumerate(curves):
            plot.add_scatter(
                x=list(abscissae),
                y=list(ordinates),
                mode="lines+markers",
                marker={"size": 5},
                line={"color": colour, "width": 1.8, "dash": dash},
                opacity=0.85,
                name=name,
                legendgroup=name,
                showlegend=index == 0,
                hovertemplate=f"{name}: %{{y:.4g}} at %{{x}}<extra></extra>",
            )
    return styled(plot, x=x, y=y)


def points_with_means(
    values: Mapping[str, Sequence[float]],
    *,
    y: str,
    colours: Mapping[str, str],
    suffix: str = "%",
) -> go.Figure:
    """One dot a seed, one bar a mean, by name."""
    plot = go.Figure()
    for name, figures in values.items():
        if not figures:
            continue
        colour = colours.get(name, COLOURS[0])
        plot.add_bar(
            x=[name],
            y=[sum(figures) / len(figures)],
            marker_color=colour,
            opacity=0.35,
            width=0.5,
            showlegend=False,
            hovertemplate=f"{name}: mean %{{y:.2f}}{suffix}<extra></extra>",
        )
        plot.add_scatter(
            x=[name] * len(figures),
            y=list(figures),
            mode="markers",
            marker={"color": colour, "size": 9, "line": {"color": "white", "width": 1}},
            showlegend=False,
            hovertemplate=f"{name}: %{{y:.2f}}{suffix}<extra></extra>",
        )
    plot.update_yaxes(ticksuffix=suffix, rangemode="tozero")
    return styled(plot, x="", y=y, height=340)


def bytes_held(footprints: Mapping[str, Footprint]) -> go.Figure:
    """Stacked bars of the MiB a training step holds, by name."""
    kinds: tuple[tuple[str, str], ...] = (
        ("weights", "weights the optimizer updates"),
        ("working", "16-bit copies of them"),
        ("gradients", "gradients of the weights"),
        ("optimizer", "optimizer state"),
        ("activations", "activations kept for the backward"),
    )
    plot = go.Figure()
    for (attribute, title), colour in zip(kinds, COLOURS, strict=False):
        sizes: list[Any] = [getattr(held, attribute) / 2**20 for held in footprints.values()]
        plot.add_bar(
            y=list(footprints),
            x=sizes,
            name=title,
            orientation="h",
            marker_color=colour,
            hovertemplate=f"{title}: %{{x:.2f}} MiB<extra></extra>",
        )
    plot.update_layout(barmode="stack")
    plot.update_yaxes(autorange="reversed")
    return styled(plot, x="MiB", y="", height=130 + 52 * len(footprints))
