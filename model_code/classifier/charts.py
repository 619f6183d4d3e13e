"""The report's plots: plotly figures, each with its words and its numbers.

Every plot can be read without colour: lines differ in dashes and markers, bars in patterns. Text of others goes through
``markup.in_plot``. Long series are thinned for the eye; what the plot says is computed before.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from classifier.layout import readable_labels
from classifier.markup import Chart, finite, in_plot, plain

COLOURS = ("#2f7de1", "#d9483b", "#1f9254", "#b8720a", "#8f5fe0", "#6b7280")
"""Each at least 3:1 against the light page and the dark one (WCAG 1.4.11)."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "cross")
PATTERNS = ("", "/", ".", "x", "-", "|")
MAX_CONFUSION = 40
MAX_BARS = 60
MAX_POINTS = 600
MAX_ROWS = 200


def _dict(
    figure: Any, x: str, y: str, height: int = 320, *, legend: bool = True, layout: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Plotly's JSON with titled axes; the page adds the colours of its theme."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 64, "r": 16, "t": 40 if legend else 16, "b": 56},
        legend={"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0, "xanchor": "left", "traceorder": "normal"},
        showlegend=legend,
        hoverlabel={"namelength": -1},
    )
    figure.update_xaxes(title={"text": x, "standoff": 8}, automargin=True)
    figure.update_yaxes(title={"text": y, "standoff": 8}, automargin=True)
    figure.update_layout(layout or {})
    found: dict[str, Any] = finite(figure.to_plotly_json())
    found["layout"].pop("template", None)
    return found


def _line(number: int, width: float = 2) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "dash": DASHES[number % len(DASHES)], "width": width}


def _marker(number: int, size: int = 8) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "symbol": MARKERS[number % len(MARKERS)], "size": size}


def _thin(rows: Sequence[Any], most: int = MAX_POINTS) -> list[Any]:
    """At most ``most`` of the rows, evenly, the last one among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def _log_axis(values: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis over positive values with round ticks, at least two of them between the ends where the values allow it."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    ticks: list[float] = []
    for factors in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = [factor * 10.0**power for power in range(low, high + 1) for factor in factors]
        if sum(min(values) <= tick <= max(values) for tick in ticks) >= 2:
            break
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


# --- data set ----------------------------------------------------------------------------------------------------------------


def balance(classes: list[dict[str, Any]]) -> Chart:
    """Pictures of every class and split, from the smallest training class on; of many classes the two ends."""
    ordered = sorted(classes, key=lambda row: (row.get("train", 0), str(row.get("folder"))))
    shown = ordered if len(ordered) <= MAX_BARS else ordered[: MAX_BARS // 2] + ordered[-MAX_BARS // 2 :]
    folders = [str(row.get("folder")) for row in ordered]
    labels = dict(zip(folders, readable_labels(folders), strict=True))
    names = [f"{number + 1}. {in_plot(labels[str(row.get('folder'))], 22)}" for number, row in enumerate(shown)]
    figure = go.Figure()
    for number, split in enumerate(("train", "valid", "test")):
        figure.add_bar(
            x=[row.get(split, 0) for row in shown],
            y=names,
            orientation="h",
            name=split,
            marker={"color": COLOURS[number], "pattern": {"shape": PATTERNS[number]}},
        )
    train = [int(row.get("train", 0)) for row in ordered]
    summary = f"{len(ordered)} classes with {train[0]:,} to {train[-1]:,} training pictures, {sum(train):,} in all."
    if len(shown) < len(ordered):
        summary += f" Shown: the {MAX_BARS // 2} smallest and the {MAX_BARS // 2} largest."
    rows: list[list[object]] = [
        [str(row.get("folder")), row.get("train", 0), row.get("valid", 0), row.get("test", 0)] for row in ordered
    ]
    layout = {"barmode": "stack", "yaxis": {"type": "category", "autorange": "reversed"}, "bargap": 0.25}
    return Chart(
        "balance",
        "Pictures per class",
        summary,
        _dict(figure, "pictures", "class", 130 + 20 * len(shown), layout=layout),
        ["class", "train", "valid", "test"],
        rows,
    )


# --- tuning ------------------------------------------------------------------------------------------------------------------


def objective(rows: list[dict[str, Any]], metric: str) -> Chart | None:
    """Objective over learning rate, one marker a batch size, open markers for trials that stopped early; None without rates."""
    known = [row for row in rows if row["learning_rate"] and row["objective"] is not None]
    if not known:
        return None
    figure = go.Figure()
    sizes = sorted({row["batch_size"] or 0.0 for row in known})
    for number, size in enumerate(sizes):
        chosen = [row for row in known if (row["batch_size"] or 0.0) == size]
        symbols = [MARKERS[number % len(MARKERS)] + ("-open" if row["stopped_early"] else "") for row in chosen]
        figure.add_scatter(
            x=[row["learning_rate"] for row in chosen],
            y=[row["objective"] for row in chosen],
            mode="markers",
            name=f"batch {size:g}" if size else "batch not tuned",
            marker={"size": 11, "color": COLOURS[number % len(COLOURS)], "symbol": symbols, "line": {"width": 2}},
            text=[in_plot(row["name"], 40) for row in chosen],
        )
    best = max(known, key=lambda row: row["objective"])
    size = f" and batch size {best['batch_size']:g}" if best["batch_size"] else ""
    summary = f"The best trial, {best['objective']:.4f}, has learning rate {best['learning_rate']:.4g}{size}. Open: stopped early."
    table: list[list[object]] = [
        [row["name"], row["learning_rate"], row["batch_size"], row["objective"], row["stopped_early"]] for row in known
    ]
    return Chart(
        "objective",
        "Objective against learning rate",
        summary,
        _dict(
            figure,
            "learning rate (logarithmic)",
            in_plot(metric, 40),
            layout={"xaxis": _log_axis([row["learning_rate"] for row in known])},
        ),
        ["trial", "learning rate", "batch size", plain(metric), "stopped early"],
        table,
    )


def _axis(values: list[str | None]) -> tuple[list[float | None], list[tuple[float, str]]]:
    """Places from 0 to 1 on a parallel axis and its ticks; numbers by size (by logarithm over two decades), words by name."""
    numbers: list[float | None] = []
    for value in values:
        try:
            numbers.append(None if value is None else float(value))
        except ValueError:
            words = sorted({text for text in values if text is not None})
            step = max(1, len(words) - 1)
            return [None if v is None else words.index(v) / step for v in values], [(i / step, w) for i, w in enumerate(words)]
    known = [value for value in numbers if value is not None and math.isfinite(value)]
    if not known:
        return [None for _ in values], []
    low, high = min(known), max(known)
    log = low > 0 and high / low >= 30

    def place(value: float | None) -> float | None:
        if value is None or not math.isfinite(value):
            return None
        if low == high:
            return 0.5
        if log:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)

    ends = [(0.5, f"{low:.4g}")] if low == high else [(0.0, f"{low:.4g}"), (1.0, f"{high:.4g}")]
    return [place(value) for value in numbers], ends


def parallel(rows: list[dict[str, Any]], metric: str) -> Chart | None:
    """Parallel coordinates: one line a trial through its hyperparameters to its objective; None without trials.

    Drawn as lines of its own: plotly's ``parcoords`` needs WebGL, which neither prints nor runs under the page's policy.
    """
    names = sorted({key for row in rows for key in row["hyperparameters"]})
    shown = _thin([row for row in rows if row["objective"] is not None], 100)
    if not shown or not names:
        return None
    columns = [[row["hyperparameters"].get(key) for row in shown] for key in names]
    columns.append([repr(row["objective"]) for row in shown])
    axes = [_axis(column) for column in columns]
    titles = [in_plot(key, 24) for key in names] + [in_plot(metric, 24)]
    figure = go.Figure()
    for number, row in enumerate(shown):
        best = number == 0
        figure.add_scatter(
            x=list(range(len(axes))),
            y=[places[number] for places, _ in axes],
            mode="lines+markers",
            name=in_plot(row["name"], 40),
            line={**_line(0 if best else 5, 4 if best else 1.2), "dash": "dash" if row["stopped_early"] else "solid"},
            marker={"size": 9 if best else 5, "symbol": "circle" if best else "circle-open"},
            text=[f"{title}: {in_plot(column[number])}" for title, column in zip(titles, columns, strict=True)],
            hoverinfo="text+name",
        )
    for x, (_, ticks) in enumerate(axes):
        figure.add_vline(x=x, line={"width": 1, "color": COLOURS[5]})
        for y, label in ticks:
            figure.add_annotation(
                x=x, y=y, text=in_plot(label, 16), showarrow=False, yshift=-14 if y < 0.5 else 14, font={"size": 12}
            )
    table: list[list[object]] = [
        [row["name"], *(row["hyperparameters"].get(key) for key in names), row["objective"], row["stopped_early"]] for row in shown
    ]
    layout = {
        "xaxis": {
            "tickvals": list(range(len(axes))),
            "ticktext": titles,
            "range": [-0.35, len(axes) - 0.65],
            "showgrid": False,
            "tickangle": -25,
        },
        "yaxis": {"range": [-0.14, 1.14], "showticklabels": False, "showgrid": False, "zeroline": False},
    }
    return Chart(
        "parallel",
        "Trials in parallel coordinates",
        f"{len(shown)} trials, one line each; the thick line is the best one, dashed lines stopped early.",
        _dict(figure, "hyperparameters and objective", "low to high, each axis by itself", legend=False, layout=layout),
        ["trial", *map(plain, names), plain(metric), "stopped early"],
        table,
    )


# --- training ----------------------------------------------------------------------------------------------------------------


def curves(history: list[dict[str, Any]], kind: str) -> Chart:
    """Train and valid ``loss`` (nats) or ``top1`` (share) by epoch."""
    figure = go.Figure()
    epochs = [row.get("epoch") for row in history]
    columns = {split: [_number(row.get(f"{split}_{kind}")) for row in history] for split in ("train", "valid")}
    for number, (split, values) in enumerate(columns.items()):
        figure.add_scatter(x=epochs, y=values, mode="lines+markers", name=split, line=_line(number), marker=_marker(number))
    known = [value for values in columns.values() for value in values if value is not None and value == value]
    log = kind == "loss" and bool(known) and min(known) > 0 and max(known) > 20 * min(known)
    valid = [value for value in columns["valid"] if value is not None]
    best = (min if kind == "loss" else max)(valid, default=None)
    unit = "loss (nats)" if kind == "loss" else "top1 (share of pictures)"
    summary = f"{len(history)} epochs; best valid {kind} {plain(best)}, last {plain(valid[-1] if valid else None)}."
    layout = {"yaxis": _log_axis(known)} if log else {}
    table: list[list[object]] = [[e, t, v] for e, t, v in zip(epochs, columns["train"], columns["valid"], strict=True)]
    return Chart(
        f"curve-{kind}",
        "Loss by epoch" if kind == "loss" else "Top1 by epoch",
        summary,
        _dict(figure, "epoch", unit + (", logarithmic" if log else ""), layout=layout),
        ["epoch", f"train {kind}", f"valid {kind}"],
        table,
    )


def losses(series: list[tuple[int, float]]) -> Chart:
    """The training loss that smdebug saved, by step."""
    shown = _thin(series)
    figure = go.Figure()
    figure.add_scatter(
        x=[s for s, _ in shown], y=[v for _, v in shown], mode="lines+markers", name="loss", line=_line(0), marker=_marker(0, 4)
    )
    summary = f"{len(series)} saved steps: from {plain(float(series[0][1]))} to {plain(float(series[-1][1]))} nats."
    return Chart(
        "saved-losses",
        "Training loss by step, as saved by the hook",
        summary,
        _dict(figure, "step of training", "loss (nats)", legend=False),
        ["step", "loss"],
        [[s, v] for s, v in _thin(series, MAX_ROWS)],
    )


# --- machine -----------------------------------------------------------------------------------------------------------------


def nodes_of(events: list[dict[str, Any]], steps: list[dict[str, Any]]) -> list[str]:
    """The nodes that left system metrics or steps, ``algo-1`` first."""
    found = {str(event.get("NodeId", "algo-1")) for event in events} | {str(row.get("node", "algo-1")) for row in steps}
    return sorted(found, key=lambda node: (len(node), node))


def _series(events: list[dict[str, Any]], kind: str, metric: str) -> list[tuple[float, float]]:
    """``(time, mean over cores or GPUs)`` of a metric, which is an event's dimension or, for the memory, its name."""
    by_time: dict[float, list[float]] = defaultdict(list)
    for event in events:
        if event.get("Type") == kind and metric in (event.get("Dimension"), event.get("Name")):
            value = _number(event.get("Value"))
            if value is not None:
                by_time[float(event["Timestamp"])].append(value)
    return [(moment, statistics.fmean(values)) for moment, values in sorted(by_time.items())]


def timeline(events: list[dict[str, Any]], steps: list[dict[str, Any]], node: str, names: Sequence[str]) -> Chart:
    """CPU, memory and GPU of a node in percent, and under them, on the same clock, the milliseconds of each phase of a step."""
    events = [event for event in events if str(event.get("NodeId", "algo-1")) == node]
    steps = _one_process([row for row in steps if str(row.get("node", "algo-1")) == node])
    moments = [float(event["Timestamp"]) for event in events] + [float(row["start"]) for row in steps]
    start = min(moments)
    usage = {
        "CPU": _series(events, "cpu", "CPUUtilization"),
        "memory": _series(events, "memory", "MemoryUsedPercent"),
        "GPU": _series(events, "gpu", "GPUUtilization"),
        "GPU memory": _series(events, "gpu", "GPUMemoryUtilization"),
    }
    usage = {name: series for name, series in usage.items() if series}
    figure = go.Figure()
    for number, (name, series) in enumerate(usage.items()):
        shown = _thin(series)
        x, y = [moment - start for moment, _ in shown], [value for _, value in shown]
        figure.add_scatter(x=x, y=y, mode="lines", name=name, line=_line(number), legendgroup="usage")
    _add_phases(figure, steps, names, start)
    means = ", ".join(f"{name} {statistics.fmean([v for _, v in series]):.0f} %" for name, series in usage.items())
    length = max(moments) - start
    words = f"Above: use over {length:.0f} s, on average {means}." if usage else "No system metrics of this node."
    words += f" Below: the phases of {len({row['step'] for row in steps}):,} steps on the same clock." if steps else " No steps."
    layout: dict[str, Any] = {"yaxis": {"range": [0, 103]}}
    if steps:
        title = {"text": "step phases (ms)", "standoff": 8}
        layout = {
            "xaxis": {"anchor": "y2"},
            "yaxis": {"domain": [0.53, 1.0], "range": [0, 103]},
            "yaxis2": {"domain": [0.0, 0.47], "title": title, "anchor": "x", "rangemode": "tozero", "automargin": True},
        }
    return Chart(
        f"timeline-{node}",
        f"Use of {node} over time, with the step phases under it",
        words,
        _dict(figure, "seconds since the first sample", "use (%)", 520 if steps else 320, layout=layout),
        ["seconds", *(f"{name} (%)" for name in usage)],
        _usage_rows(usage, start),
    )


def _usage_rows(usage: dict[str, list[tuple[float, float]]], start: float) -> list[list[object]]:
    if not usage:
        return []
    first = next(iter(usage.values()))
    columns = [dict(series) for series in usage.values()]
    return [[round(moment - start, 1), *(column.get(moment) for column in columns)] for moment, _ in _thin(first, 100)]


def _one_process(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps of a node's first process: all processes of a node go in step."""
    first = min((int(row.get("rank", 0)) for row in steps), default=0)
    return [row for row in steps if int(row.get("rank", 0)) == first]


def _add_phases(figure: Any, steps: list[dict[str, Any]], names: Sequence[str], start: float) -> None:
    by_step: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    begins: dict[int, float] = {}
    for row in steps:
        by_step[row["step"]][row["phase"]] += row["duration"] * 1000
        begins[row["step"]] = min(row["start"], begins.get(row["step"], row["start"]))
    shown = _thin(sorted(begins, key=lambda step: begins[step]))
    phases = [*names, *sorted({row["phase"] for row in steps} - set(names))]
    for number, phase in enumerate(phases if steps else ()):
        figure.add_scatter(
            x=[begins[step] - start for step in shown],  # one abscissa a step, so that the phases stack
            y=[by_step[step].get(phase, 0.0) for step in shown],
            mode="lines",
            name=in_plot(phase),
            stackgroup="steps",
            yaxis="y2",
            legendgroup="phases",
            line={"width": 1, "color": COLOURS[number % len(COLOURS)]},
            fillpattern={"shape": PATTERNS[number % len(PATTERNS)]},
        )


def step_time(steps: list[dict[str, Any]], names: Sequence[str]) -> Chart:
    """Where a step's time goes: share of each phase, with its median and 95th percentile in milliseconds."""
    durations: dict[str, list[float]] = defaultdict(list)
    for row in steps:
        durations[str(row["phase"])].append(float(row["duration"]) * 1000)
    order = [name for name in names if name in durations] + sorted(set(durations) - set(names))
    total = sum(map(sum, durations.values())) or 1.0
    shares = {name: sum(durations[name]) / total for name in order}
    figure = go.Figure()
    figure.add_bar(
        x=[100 * shares[name] for name in order],
        y=[in_plot(name) for name in order],
        orientation="h",
        marker={
            "color": [COLOURS[n % len(COLOURS)] for n in range(len(order))],
            "pattern": {"shape": list(PATTERNS[: len(order)])},
        },
        text=[f"{100 * shares[name]:.0f} %" for name in order],
        textposition="outside",
        cliponaxis=False,
    )
    rows: list[list[object]] = []
    for name in order:
        ordered = sorted(durations[name])
        rows.append([name, 100 * shares[name], ordered[len(ordered) // 2], ordered[int(0.95 * (len(ordered) - 1))], len(ordered)])
    most = max(order, key=lambda name: shares[name])
    count = len({(row.get("node"), row.get("rank"), row["step"]) for row in steps})
    layout = {"yaxis": {"autorange": "reversed", "type": "category"}, "xaxis": {"range": [0, 112 * max(shares.values())]}}
    return Chart(
        "step-time",
        "Where a step's time goes",
        f"{plain(most)} takes most of it, {shares[most]:.0%} of {count:,} steps' time.",
        _dict(figure, "share of the step time (%)", "phase", 110 + 44 * len(order), legend=False, layout=layout),
        ["phase", "share (%)", "median (ms)", "95th percentile (ms)", "recorded"],
        rows,
    )


def operators(rows: list[dict[str, Any]]) -> Chart:
    """The operators that take most time in the torch.profiler window, on the device where there is one."""
    device = any((row.get("device_ms") or 0) > 0 for row in rows)
    key, where = ("device_ms", "device") if device else ("cpu_ms", "CPU")
    top = sorted(rows, key=lambda row: -(row.get(key) or 0.0))[:15]
    names = [f"{number + 1}. {in_plot(str(row.get('name')).removeprefix('aten::'), 26)}" for number, row in enumerate(top)]
    figure = go.Figure()
    figure.add_bar(x=[row.get(key) or 0.0 for row in top], y=names, orientation="h", marker={"color": COLOURS[0]})
    table: list[list[object]] = [
        [
            str(row.get("name")),
            row.get("node"),
            row.get("calls"),
            row.get("cpu_ms"),
            row.get("device_ms"),
            _percent(row.get("share")),
        ]
        for row in rows[:50]
    ]
    return Chart(
        "operators",
        "Top operators",
        f"{plain(top[0].get('name'))} takes most {where} time of the profiled steps: {plain(_number(top[0].get(key)))} ms.",
        _dict(figure, f"{where} time in the profiled window (ms)", "operator", 110 + 26 * len(top), legend=False,
              layout={"yaxis": {"autorange": "reversed", "type": "category"}}),
        ["operator", "node", "calls", "CPU (ms)", "device (ms)", "share (%)"],
        table,
    )  # fmt: skip


def _percent(share: object) -> float | None:
    value = _number(share)
    return None if value is None else 100 * value


# --- test --------------------------------------------------------------------------------------------------------------------


def confusion(table: list[list[int]], labels: list[str]) -> Chart:
    """Percent of each true class; with many classes only the most confused ones."""
    kept = list(range(len(labels)))
    if len(kept) > MAX_CONFUSION:
        errors = {i: sum(table[i]) - table[i][i] + sum(row[i] for row in table) - table[i][i] for i in kept}
        kept = sorted(sorted(kept, key=lambda i: -errors[i])[:MAX_CONFUSION])
    rows = [[100 * table[i][j] / max(1, sum(table[i])) for j in kept] for i in kept]
    names = [f"{i + 1}. {in_plot(labels[i], 18)}" for i in kept]
    figure = go.Figure(
        go.Heatmap(
            z=rows, x=names, y=names, colorscale="Blues", zmin=0, zmax=100, colorbar={"title": {"text": "%"}, "thickness": 12}
        )
    )
    right, total = sum(table[i][i] for i in range(len(table))), sum(map(sum, table))
    summary = f"{right:,} of {total:,} test pictures are on the diagonal."
    if len(kept) < len(labels):
        summary += f" Shown: the {MAX_CONFUSION} most confused of {len(labels)} classes."
    wrong = sorted(
        ((table[i][j], i, j) for i in kept for j in kept if i != j and table[i][j]), key=lambda cell: (-cell[0], cell[1:])
    )
    numbers: list[list[object]] = [[labels[i], labels[j], count, 100 * count / sum(table[i])] for count, i, j in wrong[:MAX_ROWS]]
    side = 240 + 20 * max(len(kept), 8)
    layout = {
        "yaxis": {"autorange": "reversed", "type": "category", "dtick": 1},
        "xaxis": {"type": "category", "tickangle": -60, "dtick": 1},
    }
    return Chart(
        "confusion",
        "Confusion, percent of the true class",
        summary,
        _dict(figure, "predicted class", "true class", side, legend=False, layout=layout),
        ["true class", "predicted class", "pictures", "share of the true class (%)"],
        numbers,
    )


def calibration(before: list[dict[str, float]], after: list[dict[str, float]]) -> Chart:
    """Accuracy over confidence, before and after temperature scaling."""
    figure = go.Figure()
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", name="perfect", line={"dash": "dot", "color": COLOURS[5], "width": 1.5})
    for number, (name, rows) in enumerate((("before scaling", before), ("after scaling", after))):
        x, y = [row["confidence"] for row in rows], [row["accuracy"] for row in rows]
        figure.add_scatter(x=x, y=y, mode="lines+markers", name=name, line=_line(number), marker=_marker(number))
    numbers: list[list[object]] = [
        [name, row["confidence"], row["accuracy"], row["count"]]
        for name, rows in (("before", before), ("after", after))
        for row in rows
    ]
    return Chart(
        "calibration",
        "Calibration on the test split",
        "On the dotted line, a picture said with probability p is right with probability p.",
        _dict(figure, "mean confidence (probability)", "accuracy (share right)", layout={"yaxis": {"range": [-0.03, 1.03]}}),
        ["scaling", "confidence", "accuracy", "pictures"],
        numbers,
    )


# --- several runs ------------------------------------------------------------------------------------------------------------


def runs(rows: list[dict[str, Any]], x: str, title: str) -> Chart | None:
    """Test top1 of every run over ``cost_usd`` or ``seconds``, with its interval; the champion is a star. None without any."""
    known = [row for row in rows if _number(row.get("top1")) is not None and _number(row.get(x)) is not None]
    if not known:
        return None
    figure = go.Figure()
    champions, others = [row for row in known if row.get("champion")], [row for row in known if not row.get("champion")]
    for number, (name, chosen) in enumerate((("run", others), ("champion", champions))):
        if chosen:
            low = [row["top1"] - (row.get("top1_low") or row["top1"]) for row in chosen]
            high = [(row.get("top1_high") or row["top1"]) - row["top1"] for row in chosen]
            figure.add_scatter(
                x=[row[x] for row in chosen],
                y=[row["top1"] for row in chosen],
                mode="markers",
                name=name,
                error_y={"type": "data", "array": high, "arrayminus": low, "thickness": 1},
                marker={"size": 16 if number else 10, "symbol": "star" if number else "circle", "color": COLOURS[number]},
                text=[in_plot(row["run"], 40) for row in chosen],
            )
    best = max(known, key=lambda row: row["top1"])
    return Chart(
        f"runs-{x}",
        title,
        f"{len(known)} runs; the best, {plain(best['run'], 40)}, has test top1 {best['top1']:.4f}. Bars: 95 % interval.",
        _dict(figure, "estimated cost (US dollars)" if x == "cost_usd" else "duration of all jobs (s)", "test top1 (share)", 380),
        ["run", "cost (USD)" if x == "cost_usd" else "seconds", "test top1", "champion"],
        [[str(row["run"]), row[x], row["top1"], bool(row.get("champion"))] for row in known[:MAX_ROWS]],
    )
