"""Plots as plotly JSON-ready figures; the page holds plotly.js once, inline."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed")
MAX_CONFUSION = 40


def _finish(figure: Any, title: str, x: str, y: str) -> Any:
    figure.update_layout(
        title={"text": title, "x": 0.02, "font": {"size": 15}},
        xaxis_title=x,
        yaxis_title=y,
        template="plotly_white",
        margin={"l": 60, "r": 20, "t": 48, "b": 48},
        height=340,
        legend={"orientation": "h", "y": 1.12, "x": 1, "xanchor": "right"},
    )
    return figure


def curves(history: list[dict[str, Any]], kind: str) -> Any:
    """Train and valid ``loss`` or ``top1`` by epoch."""
    figure = go.Figure()
    epochs = [row["epoch"] for row in history]
    for number, split in enumerate(("train", "valid")):
        values = [row[f"{split}_{kind}"] for row in history]
        figure.add_scatter(x=epochs, y=values, mode="lines+markers", name=split, line={"color": COLOURS[number]})
    if kind == "loss" and any(row["valid_loss"] > 5 * max(row["train_loss"], 0.1) for row in history):
        figure.update_yaxes(type="log")
    return _finish(figure, f"{kind} by epoch", "epoch", kind)


def trials(rows: list[dict[str, Any]]) -> Any:
    """Objective over learning rate, one colour a batch size."""
    figure = go.Figure()
    sizes = sorted({row["batch_size"] for row in rows if row["batch_size"] is not None})
    for number, size in enumerate(sizes):
        chosen = [row for row in rows if row["batch_size"] == size and row["objective"] is not None]
        figure.add_scatter(
            x=[row["learning_rate"] for row in chosen],
            y=[row["objective"] for row in chosen],
            mode="markers",
            name=f"batch {size:g}",
            marker={"size": 11, "color": COLOURS[number % len(COLOURS)]},
            text=[row["name"] for row in chosen],
        )
    figure.update_xaxes(type="log")
    return _finish(figure, "valid top1 of the trials over the learning rate", "learning rate (log)", "best valid top1")


def usage(cpu: list[tuple[float, float]], memory: list[tuple[float, float]], start: float) -> Any:
    """CPU and memory in percent over seconds."""
    figure = go.Figure()
    for number, (name, series) in enumerate((("CPU", cpu), ("memory", memory))):
        x, y = [moment - start for moment, _ in series], [value for _, value in series]
        figure.add_scatter(x=x, y=y, mode="lines", name=name, line={"color": COLOURS[number]})
    figure.update_yaxes(range=[0, 102])
    return _finish(figure, "CPU and memory of the training job", "seconds since the first sample", "percent")


def phases(steps: list[dict[str, Any]], start: float, names: tuple[str, ...]) -> Any:
    """Milliseconds of each phase of the training steps over time, stacked."""
    figure = go.Figure()
    begins: dict[int, float] = {}
    for row in steps:
        begins.setdefault(row["step"], row["start"])
    for number, name in enumerate(names):
        rows = [row for row in steps if row["phase"] == name]
        rows = rows[:: max(1, len(rows) // 600)]
        figure.add_scatter(
            x=[begins[row["step"]] - start for row in rows],  # one abscissa a step, so that the phases stack
            y=[row["duration"] * 1000 for row in rows],
            mode="lines",
            name=name,
            stackgroup="steps",
            line={"width": 0.5, "color": COLOURS[number]},
        )
    return _finish(figure, "step phases on the same clock", "seconds since the first sample", "ms per step")


def losses(series: list[tuple[int, float]]) -> Any:
    """The loss that smdebug saved, by step."""
    figure = go.Figure()
    figure.add_scatter(x=[s for s, _ in series], y=[v for _, v in series], mode="lines+markers", name="loss")
    return _finish(figure, "loss of saved steps (smdebug)", "step", "loss")


def confusion(table: list[list[int]], labels: list[str]) -> Any:
    """Shares of each true class; with many classes only the most confused ones."""
    kept = list(range(len(labels)))
    if len(kept) > MAX_CONFUSION:
        errors = {i: sum(table[i]) - table[i][i] + sum(row[i] for row in table) - table[i][i] for i in kept}
        kept = sorted(sorted(kept, key=lambda i: -errors[i])[:MAX_CONFUSION])
    rows = [[table[i][j] / max(1, sum(table[i])) for j in kept] for i in kept]
    names = [labels[i].replace("<", "‹").replace(">", "›").replace("&", "＆")[:30] for i in kept]
    figure = go.Figure(go.Heatmap(z=rows, x=names, y=names, colorscale="Blues", zmin=0, zmax=1))
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(type="category")
    title = "confusion" if len(kept) == len(labels) else f"confusion: the {MAX_CONFUSION} most confused classes"
    figure = _finish(figure, title, "predicted", "true")
    figure.update_layout(height=380 + 12 * len(kept))
    return figure


def calibration(before: list[dict[str, float]], after: list[dict[str, float]]) -> Any:
    """Accuracy over confidence, before and after temperature scaling."""
    figure = go.Figure()
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", name="perfect", line={"dash": "dot", "color": "#9ca3af"})
    for number, (name, rows) in enumerate((("before", before), ("after", after))):
        x, y = [row["confidence"] for row in rows], [row["accuracy"] for row in rows]
        figure.add_scatter(x=x, y=y, mode="lines+markers", name=name, line={"color": COLOURS[number]})
    return _finish(figure, "calibration on test", "confidence", "accuracy")
