"""Pictures of what was measured: `make bench-pictures` draws `docs/pictures` from the newest figures in `results`.

A picture is drawn from the `series` of measurements, each from the newest run that has it, and says at its foot where
that was measured. The same figures give the same bytes. What is missing is left out and said.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.frame import RESULTS

PICTURES = Path(__file__).parents[1] / "docs/pictures"

_OURS, _LIGHT, _LIMIT, _PEER, _TEXT = "#1f6fb2", "#a9cbe8", "#8a8f98", "#d9822b", "#24292f"
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it is found, read out, and small
    "svg.hashsalt": "identity-service",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _TEXT,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "figure.facecolor": "#ffffff",  # a page may be dark
}


@dataclass(frozen=True, slots=True)
class Found:
    """The series of a measurement, and where and when it was measured."""

    series: dict[str, float]
    where: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of a panel. `inner` is a part of `value` that is drawn darker."""

    name: str
    value: float
    colour: str
    inner: float | None = None


@dataclass(frozen=True, slots=True)
class Panel:
    """Bars under each other, on one axis from nothing."""

    title: str
    axis: str
    bars: Sequence[Bar]
    label: Callable[[Bar], str]
    where: str


Drawing: TypeAlias = tuple[list[Panel], list[str]]
"""The panels of a picture, and what is missing for it."""


def newest(id_: str, *names: str) -> Found | None:
    """Return the newest series of the measurement that has a figure for each name, or for what begins with it."""
    for path in sorted(RESULTS.glob("*.json"), reverse=True):
        run = json.loads(path.read_text(encoding="utf-8"))
        for measurement in run["measurements"]:
            series: dict[str, float] = measurement.get("series", {})
            if measurement["id"] == id_ and all(any(key.startswith(name) for key in series) for name in names):
                day = datetime.fromisoformat(run["at"]).date()
                return Found(series, f"{run['machine']}, {run['cores']} cores, Python {run['python']}, {day}")
    return None


def refresh_rate() -> Drawing:
    """P1 and P2, each with its own limit: the runs are different ones."""
    panels, missing = [], []
    limit, ours = "two RSA-2048 signatures\nand nothing else", "this service,\ndurable in Postgres"
    if found := newest("P1", "limit", "identity-service"):
        bars = [Bar(limit, found.series["limit"], _LIMIT), Bar(ours, found.series["identity-service"], _OURS)]
        panels.append(_rates("Refreshes with a core for the service", bars, found))
    else:
        missing.append("P1 (make bench)")
    if found := newest("P2", "two RSA-2048 signatures", "ours", "oidc-provider"):
        bars = [
            Bar(limit, found.series["two RSA-2048 signatures (the limit)"], _LIMIT),
            Bar(ours, found.series["ours"], _OURS),
            Bar("oidc-provider,\nin memory", found.series["oidc-provider"], _PEER),
        ]
        panels.append(_rates("Refreshes, in turns with a peer on the same core", bars, found))
    else:
        missing.append("P2 (make bench-peers)")
    return panels, missing


def _rates(title: str, bars: Sequence[Bar], found: Found) -> Panel:
    return Panel(title, "refreshes a second (1/s)", bars, lambda bar: f"{bar.value:,.0f}", found.where)


def login_flood() -> Drawing:
    """P5 and P6. How long a refresh takes, and how much of its rate is left, while logins saturate the service."""
    panels, missing = [], []
    if found := newest("P5", "p50 alone", "p50 beside", "p99 alone", "p99 beside"):
        bars = [
            Bar(f"{percentile}, {name}", found.series[f"{percentile} {key}"] * 1e3, colour)
            for percentile in ("p50", "p99")
            for key, name, colour in (("alone", "alone", _LIGHT), ("beside", "beside logins", _OURS))
        ]
        title = "A refresh, of 100 a second, beside 16 connections that log in"
        panels.append(Panel(title, "latency (ms)", bars, lambda bar: f"{bar.value:.1f}", found.where))
    else:
        missing.append("P5 (make bench)")
    if found := newest("P6", "kept by ours"):
        bars = [Bar("this service,\nrefreshes", found.series["kept by ours"] * 100, _OURS)]
        if (peer := found.series.get("kept by fastapi-users")) is not None:
            bars.append(Bar("fastapi-users,\n/users/me", peer * 100, _PEER))
        else:
            missing.append("fastapi-users' part of P6 (make bench-peers)")
        title = "What is left of the rate beside 16 connections that log in"
        panels.append(Panel(title, "rate kept (%)", bars, lambda bar: f"{bar.value:.3g}", found.where))
    else:
        missing.append("what is kept in P6 (make bench-peers)")
    return panels, missing


def sessions() -> Drawing:
    """P9. Sizes are named in the series."""
    panels, missing = [], []
    processor, log, images = "processor seconds at ", "bytes of log at ", "bytes of log with page images at "
    if found := newest("P9", processor):
        bars = [Bar(f"{size} sessions", seconds * 1e6, _OURS) for size, seconds in _by_size(found, processor)]
        axis = "processor time of Postgres per refresh (µs)"
        panels.append(Panel("Processor time", axis, bars, lambda bar: f"{bar.value:.0f}", found.where))
    else:
        missing.append("the processor time of P9 (make bench-scale)")
    if found := newest("P9", log, images):
        bars = [
            Bar(f"{size} sessions", found.series[images + size], _LIGHT, inner=octets)
            for size, octets in _by_size(found, log)
        ]
        title = "Log (WAL): what a refresh writes, and light, images of pages after each checkpoint"
        axis = "log per refresh (bytes)"
        panels.append(Panel(title, axis, bars, lambda bar: f"{bar.inner:,.0f} of {bar.value:,.0f}", found.where))
    else:
        missing.append("the log of P9 (make bench-scale)")
    return panels, missing


def _by_size(found: Found, prefix: str) -> list[tuple[str, float]]:
    return [(key.removeprefix(prefix), value) for key, value in found.series.items() if key.startswith(prefix)]


def draw(path: Path, panels: Sequence[Panel]) -> None:
    heights = [len(panel.bars) + 1.5 for panel in panels]
    with rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 0.42 * sum(heights) + 0.4), layout="constrained")
        rows = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
        for axes, panel in zip(rows[:, 0], panels, strict=True):
            _draw_panel(axes, panel)
        caption = "\n".join(dict.fromkeys(panel.where for panel in panels))
        figure.supxlabel(caption, fontsize=8, x=0.99, ha="right")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def _draw_panel(axes: Axes, panel: Panel) -> None:
    names, most = [bar.name for bar in panel.bars], max(bar.value for bar in panel.bars)
    colours = [bar.colour for bar in panel.bars]
    axes.barh(names, [bar.value for bar in panel.bars], color=colours, height=0.62)
    for place, bar in enumerate(panel.bars):
        if bar.inner is not None:
            axes.barh(bar.name, bar.inner, color=_OURS, height=0.62)
        axes.text(bar.value + most * 0.01, place, panel.label(bar), va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, most * 1.2)
    axes.set_title(panel.title)
    axes.set_xlabel(panel.axis)
    axes.tick_params(axis="y", length=0)


def main() -> None:
    for name, find in (("refresh-rate", refresh_rate), ("login-flood", login_flood), ("sessions", sessions)):
        panels, missing = find()
        path = PICTURES / f"{name}.svg"
        if panels:
            draw(path, panels)
            print(f"  {name}.svg: {path.stat().st_size / 1000:.0f} kB")
        else:
            print(f"  {name}.svg: not drawn")
        for what in missing:
            print(f"    left out: {what}, which no file in bench/results has figures for")


if __name__ == "__main__":
    main()
