"""The figures of `murmur bench` for a person's eyes."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from pipeline.bench.rounds import Figures


def show_engine(figures: Figures, console: Console) -> None:
    plan = figures["plan"]
    console.print(
        f"{plan['model']}; {plan['windows']} windows of 30 s, {plan['tokens']} tokens each, log-mel included; "
        f"{plan['threads']} threads, {plan['rounds']} rounds in turn: the median and their range; "
        "8 x 2: two batches of 8 at once; alone: 4 windows by its own call for recordings; "
        "same: windows with the tokens of ours in float32; MB: peak of the process. "
        "In brackets: the range of the rounds, and the figure by processor time",
        highlight=False,
    )
    console.print(_race(figures))
    for line in (*_absent(figures), *_ratios(figures), *_lines(figures)):
        console.print(line, markup=False, highlight=False)


def show_http(figures: Figures, console: Console) -> None:
    answers = ", ".join(f"{count} x {status}" for status, count in sorted(figures["answers"].items())) or "none"
    console.print(f"answers: {answers}; RTFx {figures['rtfx']:.1f}, {figures['answers_per_s']:.2f} a second")
    for name in ("answer", "refusal"):
        if took := figures[f"{name}_s"]:
            spread = f"median {took['median']:.2f} s, 95 % within {took['p95']:.2f} s, longest {took['longest']:.2f} s"
            console.print(f"{name}: {spread}", highlight=False)
    console.print(f"the clients took {figures['cores_of_the_clients']:.2f} cores of this machine", highlight=False)
    for error, count in figures["errors"].items():
        console.print(f"{count} x {error}", markup=False, highlight=False)


def _race(figures: Figures) -> Table:
    """A line fits into 80 columns."""
    headers = ("", "batch", "s/window", "range", "win/s", "RTFx", "tokens", "same", "MB")
    table = Table(*headers, box=None, pad_edge=False, collapse_padding=True)
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[2:]:
        column.justify = "right"
    for entry in figures["contestants"]:
        if "s_per_window" in entry:
            table.add_row(f"{entry['library']} {entry['dtype']}", *_cells(entry))
    return table


def _cells(entry: Figures) -> list[str]:
    seconds, tokens, same = entry["s_per_window"], entry["tokens_per_window"], entry["same_tokens"]
    return [
        entry["setting"],
        f"{seconds['median']:.3f}",
        f"{seconds['min']:.3f}-{seconds['max']:.3f}",
        f"{entry['windows_per_s']:.2f}",
        f"{entry['rtfx']:.1f}",
        f"{tokens['min']}" if tokens["min"] == tokens["max"] else f"{tokens['min']}-{tokens['max']}",
        "" if same is None else f"{same:.0%}",
        f"{entry['peak_rss_mb']}",
    ]


def _absent(figures: Figures) -> Iterator[str]:
    for library, reason in figures["missing"].items():
        yield f"{library}: {reason}"
    for entry in figures["contestants"]:
        if entry["error"] is not None:
            yield f"{entry['library']} {entry['dtype']}: failed: {entry['error']}"


def _ratios(figures: Figures) -> Iterator[str]:
    for ratio in figures["ratios"].values():
        yield f"ours is {_times(ratio['ours_is_faster'])} times as fast as {ratio['best']}"


def _lines(figures: Figures) -> Iterator[str]:
    """What is known of ours, a line each."""
    if stages := figures.get("stages"):
        parts = ", ".join(f"{name} {1000 * seconds:.0f}" for name, seconds in stages["s_per_window"].items())
        yield f"stages, ms a window: {parts}"
        share = _times(stages["encoder_share_of_peak"])
        yield f"encoder: {stages['encoder_tflops']['median']:.2f} TFLOP/s, {share} of what one matrix product reaches"
    if floors := figures.get("floors"):
        shares = ", ".join(f"{name} {_share(stage)}" for name, stage in floors["stages"].items())
        ceiling, reached = floors["ceiling_rtfx"], floors["share_of_ceiling"]
        yield f"share of the device's limits: {shares}; all in all {reached:.0%} of RTFx {ceiling:.0f}"
    if processes := figures.get("processes"):
        rate, times = (processes[key]["median"] for key in ("windows_per_s", "times_one"))
        yield f"{processes['processes']} processes at once: {rate:.2f} windows a second, {times:.2f} times those of one"
    memory = figures["memory"]
    yield (
        f"memory: {memory['lanes']} lanes of {memory['lane_bytes'] / 1e6:.1f} MB, "
        f"weights {memory['weights_bytes'] / 1e6:.0f} MB, peak of the process {memory['peak_rss_mb']} MB"
    )
    if words := figures.get("words"):
        yield f"with word times the decode takes {_times(words['takes_times_as_long'])} times as long"
    if vad := figures.get("vad"):
        yield f"VAD: {_times(vad['share_of_engine'], 3)} of the engine's time"
    if spread := figures.get("spread"):
        tokens, faster = spread["tokens"], spread["refill_is_faster_than"]
        yield (
            f"{spread['windows']} windows of {tokens['shortest']} to {tokens['longest']} tokens: refilled lanes are "
            f"{_times(faster['static_padded'])} times as fast as static batches, {_times(faster['static'])} times as "
            "fast as batches that rows leave as they end"
        )
    if sequential := figures.get("sequential"):
        share = sequential["share_of_windows"]
        yield (
            f"sequential, {sequential['recordings']} recordings at once: {_times(share['sequential'])} of the windows "
            f"per second of windows, {_times(share['sequential_conditioned'])} with conditioning"
        )
    if peaks := figures.get("peaks"):
        yield (
            f"machine: bf16 {peaks['bfloat16_tflops']:.2f} and float32 {peaks['float32_tflops']:.2f} TFLOP/s, "
            f"reads {peaks['read_gb_per_s']:.0f} GB/s"
        )


def _share(stage: Figures) -> str:
    return f"{stage['share_of_floor']:.0%} by {stage['limit']}"


def _times(figure: Figures, digits: int = 2) -> str:
    low, high, by_cpu_time = (f"{figure[key]:.{digits}f}" for key in ("min", "max", "by_cpu_time"))
    return f"{figure['median']:.{digits}f} ({low}-{high}; {by_cpu_time})"
