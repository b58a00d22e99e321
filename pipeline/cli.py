"""The command `murmur`: arguments to a call, a result to text and an exit code. No work is done here.

Heavy libraries are imported by the command that needs them, so that `--help` and a mistyped option answer at once.
Every error ends as one line on stderr: what is refused with its own exit code, anything unexpected with 1 and the
file that has its traceback.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from pipeline import logs
from pipeline.config import Config, load_config
from pipeline.errors import EXIT_FAILED, EXIT_OK, MurmurError, UsageError, redact
from pipeline.signals import Stopped, stop_on_signals

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.engine import Engine
    from pipeline.report import Summary
    from pipeline.report_page import Section
    from pipeline.submit import Command, Job
    from pipeline.types import Transcript

EXIT_UNEXPECTED = 1
DEMO_OUTPUT = "demo-out"
SUBMITTED = ("transcribe", "retry", "finalize", "verify", "clean", "evaluate")  # what `murmur submit` takes


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"murmuration {version('murmuration')}")
        raise typer.Exit


app = typer.Typer(
    name="murmur",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="The version, and exit.")
    ] = False,
) -> None:
    """Transcribe large audio corpora with Whisper on Ray."""


bench = typer.Typer(help="Measure it on this machine.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench, name="bench")


class Format(StrEnum):
    txt = "txt"
    srt = "srt"
    vtt = "vtt"
    tsv = "tsv"
    json = "json"


class ExportFormat(StrEnum):
    txt = "txt"
    srt = "srt"
    vtt = "vtt"
    tsv = "tsv"
    json = "json"
    nemo = "nemo"


class Preset(StrEnum):
    training = "training"


OutputArgument = Annotated[str, typer.Argument(metavar="OUTPUT", help="The folder or URI of a run.")]
Model = Annotated[str | None, typer.Option(help="Hub id, folder, fsspec URI, or demo.", show_default=False)]
ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="YAML with settings.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any of pipeline/config.py; may be repeated.")
]
Json = Annotated[bool, typer.Option("--json", help="The last line on stdout is one JSON object.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Ray's own logs, and tracebacks.")]


@app.command()
def demo(
    output: Annotated[str, typer.Option(metavar="URI", help="Where the tables go.")] = DEMO_OUTPUT,
    sets: Sets = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run the real job on the bundled clips and model. Shows what came of it."""
    from pipeline import report
    from pipeline.demo import clips_path

    console = _console(as_json)
    config = load_config(overrides={"model": "demo"}, sets=sets or ())
    logs.set_up(config.log_format, verbose=verbose)
    manifest = clips_path() / "manifest.jsonl"
    console.print(
        f"Transcribing the clips in {manifest.parent} with the bundled demo model (a small synthetic vocabulary in "
        f"three languages; its windows are {config.chunk_length_s} s)."
    )
    summary = _run([str(manifest)], output, config, console)
    result = _open(output)
    report.show_recordings(result, console)
    report.show_failures(result, console)
    report.show_summary(summary, result, console)
    console.print(f"The tables are Parquet files in {result.store}/segments, words and recordings.", highlight=False)
    console.print("Next, your own audio: murmur transcribe FOLDER --output out --model openai/whisper-base")
    as_expected = report.failed_ids(result) == _expected_failures(manifest) and not summary.counts["missing"]
    _finish(EXIT_OK if as_expected else EXIT_FAILED, as_json, summary.to_json())


@app.command()
def transcribe(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT", help="Manifests, folders, globs, audio files.")],
    output: Annotated[str | None, typer.Option(metavar="URI", help="Run on Ray and write tables here.")] = None,
    format: Annotated[Format | None, typer.Option(help="Without --output: what to print.", show_default="txt")] = None,
    model: Model = None,
    config_file: ConfigFile = None,
    sets: Sets = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what there is to do.")] = False,
    check_inputs: Annotated[
        bool, typer.Option("--check-inputs", help="Do again what was done from files that were replaced since.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Transcribe audio into tables, or print the text.

    With --output on Ray into tables; the same command again goes on. Else here, as text.
    """
    config = load_config(config_file, {"model": model}, sets or ())
    logs.set_up(config.log_format, verbose=verbose)
    if output is None:
        if dry_run or check_inputs:
            option = "--dry-run" if dry_run else "--check-inputs"
            raise UsageError(f"{option} needs --output: without it there is no run to look at")
        _finish(*_print_transcripts(inputs, config, format or Format.txt, as_json))
    if format is not None:
        raise UsageError(
            f"--format is for what is printed without --output; with it: murmur export {output} --format {format.value}"
            " --to DIR, when the run is done"
        )
    console = _console(as_json)
    if dry_run:
        _finish(EXIT_OK, as_json, _show_estimate(inputs, output, config, console, check_inputs))
    _warn_of_demo(config)
    summary = _run(inputs, output, config, console, check_inputs=check_inputs)
    _show_end(summary, output, config, console)
    _finish(summary.exit_code, as_json, summary.to_json())


@app.command()
def retry(
    output: OutputArgument,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="INPUT", help="Where the failed ones are now; default: as before."),
    ] = None,
    sets: Sets = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Do again what failed, and only that."""
    console = _console(as_json)
    config = load_config(sets=sets or (), base=_open(output).run.settings)
    logs.set_up(config.log_format, verbose=verbose)
    summary = _run(inputs or [], output, config, console, retry=True)
    _show_end(summary, output, config, console)
    _finish(summary.exit_code, as_json, summary.to_json())


@app.command()
def finalize(output: OutputArgument, as_json: Json = False, verbose: Verbose = False) -> None:
    """Make the tables of what is committed now. Any time, also while a run goes on."""
    from pipeline import report
    from pipeline.job import finalize_output

    logs.set_up(verbose=verbose)
    console = _console(as_json)
    success = finalize_output(output, load_config(base=_open(output).run.settings))
    console.print(report.counted(success.counts))
    console.print("complete" if success.complete else "not complete: the run has more to do")
    _finish(EXIT_OK, as_json, {**success.counts, "complete": success.complete, "audio_s": success.audio_s})


@app.command()
def verify(
    output: OutputArgument,
    repair: Annotated[bool, typer.Option("--repair", help="Put right what can be.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Check all tables and data against what was written. Any time, also while a run goes on."""
    from pipeline import verify as verifying

    logs.set_up(verbose=verbose)
    found = verifying.repair(_open(output)) if repair else verifying.check(_open(output))
    console = _console(as_json)
    for line in found.lines(output):
        console.print(line, markup=False, highlight=False)
    _finish(found.exit_code, as_json, found.to_json())


@app.command()
def clean(
    output: OutputArgument,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what could go.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Remove what killed runs left and what was superseded. Only while nobody works on the output."""
    from pipeline.clean import clean as clean_up

    logs.set_up(verbose=verbose)
    found = clean_up(_open(output), dry_run=dry_run)
    words = ", ".join(found.words()) or "nothing"
    _console(as_json).print(f"{'could be removed' if dry_run else 'removed'}: {words}", highlight=False)
    _finish(EXIT_OK, as_json, found.to_json())


@app.command("report")
def report_command(
    output: OutputArgument,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write one page with charts, too.")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show how far a run is and what came of it. Also while it goes on."""
    from pipeline import report, report_page
    from pipeline.figures import figures

    logs.set_up(verbose=verbose)
    console = _console(as_json)
    found = figures(_open(output))
    report.show_figures(found, console)
    if html is not None:
        _write(html, report_page.page(found, _evaluated(output)))
        console.print(f"page: {html}", markup=False, highlight=False)
    _finish(EXIT_OK, as_json, found.to_json())


@app.command()
def evaluate(
    output: OutputArgument,
    reference: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="id and text (.jsonl, .csv, .parquet), in place of the manifest's `text`."),
    ] = None,
    against: Annotated[str | None, typer.Option(metavar="OUTPUT", help="Compare with another output.")] = None,
    worst: Annotated[int, typer.Option(min=0, help="How many recordings to show.")] = 10,
    resamples: Annotated[int, typer.Option(min=100, help="For the intervals.")] = 1000,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Word and character error rates against references. With intervals, and where the errors are."""
    from pipeline import evaluation, evaluation_report, references

    logs.set_up(verbose=verbose)
    console = _console(as_json)
    mine, other = _open(output), _open(against) if against is not None else None
    given = references.from_file(reference) if reference is not None else None
    found = evaluation.evaluate(mine, given, against=other, n_worst=worst, resamples=resamples)
    evaluation_report.show(found, console)
    _finish(EXIT_OK, as_json, found.to_json())


@app.command("export")
def export_command(
    output: OutputArgument,
    format: Annotated[ExportFormat, typer.Option(help="nemo: one manifest; else a file for each recording.")],
    to: Annotated[str, typer.Option(metavar="DIR", help="Where the files go: a folder, or a URI of one.")],
    root: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Of the audio: DIR/sub/talk.srt for FOLDER/sub/talk.mp3. Else by ids."),
    ] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Of an unfinished run, what is there.")] = False,
    include_failed: Annotated[
        bool, typer.Option("--include-failed", help="Also recordings that failed, as far as they were decoded.")
    ] = False,
    preset: Annotated[
        Preset | None, typer.Option("--filter", help="A set of the criteria below; those given override it.")
    ] = None,
    min_avg_logprob: Annotated[float | None, typer.Option(help="Segments: at least.", show_default=False)] = None,
    max_compression_ratio: Annotated[float | None, typer.Option(help="Segments: at most.", show_default=False)] = None,
    max_no_speech_prob: Annotated[float | None, typer.Option(help="Segments: at most.", show_default=False)] = None,
    min_duration_s: Annotated[float | None, typer.Option(help="Segments: at least.", show_default=False)] = None,
    max_duration_s: Annotated[float | None, typer.Option(help="Segments: at most.", show_default=False)] = None,
    language: Annotated[list[str] | None, typer.Option(help="Segments in it; may be repeated.")] = None,
    exclude_flag: Annotated[
        list[str] | None, typer.Option(help="Segments without it; any: without flags. May be repeated.")
    ] = None,
    exclude_recording_flag: Annotated[
        list[str] | None, typer.Option(help="Recordings without it; as above. May be repeated.")
    ] = None,
    max_uncovered_fraction: Annotated[
        float | None,
        typer.Option(help="Recordings: of their speech, at most this without text.", show_default=False),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Parquet of a query: recording_id, and segment_id if not all of each."),
    ] = None,
    max_line_length: Annotated[int | None, typer.Option(help="srt, vtt: characters.", show_default="42")] = None,
    max_lines: Annotated[int | None, typer.Option(help="srt, vtt: of a cue.", show_default="2")] = None,
    min_cue_s: Annotated[float | None, typer.Option(help="srt, vtt: where there is room.", show_default="1")] = None,
    max_cue_s: Annotated[float | None, typer.Option(help="srt, vtt.", show_default="7")] = None,
    max_chars_per_s: Annotated[
        float | None, typer.Option(help="srt, vtt: held longer to be read at this speed.", show_default="20")
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write transcripts, subtitles or a training manifest.

    A file for each recording, or one manifest of segments.
    """
    from pipeline import export as exporting
    from pipeline.selection import PRESETS, Selection
    from pipeline.subtitles import Rules

    logs.set_up(verbose=verbose)
    rules = _given(
        max_line_length=max_line_length, max_lines=max_lines, min_cue_s=min_cue_s, max_cue_s=max_cue_s,
        max_chars_per_s=max_chars_per_s,
    )  # fmt: skip
    if rules and format.value not in exporting.SUBTITLES:
        raise UsageError(f"--{next(iter(rules)).replace('_', '-')} is for srt and vtt, not for {format.value}")
    if root is not None and format is ExportFormat.nemo:
        raise UsageError("--root is for a file for each recording; nemo writes one manifest")
    criteria = _given(
        min_avg_logprob=min_avg_logprob, max_compression_ratio=max_compression_ratio,
        max_no_speech_prob=max_no_speech_prob, min_duration_s=min_duration_s, max_duration_s=max_duration_s,
        languages=tuple(language or ()) or None, exclude_flags=tuple(exclude_flag or ()) or None,
        exclude_recording_flags=tuple(exclude_recording_flag or ()) or None,
        max_uncovered_fraction=max_uncovered_fraction, rows=None if where is None else exporting.read_rows(where),
    )  # fmt: skip
    selection = dataclasses.replace(PRESETS[preset.value] if preset else Selection(), **criteria)
    done = exporting.export(
        _open(output), format.value, to, selection, Rules(**rules), partial=partial, include_failed=include_failed,
        root=root,
    )  # fmt: skip
    console = _console(as_json)
    for line in done.lines():
        console.print(line, markup=False, highlight=False)
    _finish(EXIT_OK, as_json, done.to_json())


@app.command()
def serve(
    models: Annotated[
        list[str] | None,
        typer.Option("--model", help="Hub id, folder, fsspec URI, or demo; may be repeated.", show_default=False),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Others than this machine need tokens.", show_default="127.0.0.1")
    ] = None,
    port: Annotated[int | None, typer.Option(show_default="8000")] = None,
    config_file: ConfigFile = None,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Answer over HTTP, until a signal comes. DeepInfra's route, OpenAI's, and a page to try it on."""
    from serve_app.deployment import serve_here

    own = {"host": host, "port": port}
    configs = [load_config(config_file, {"model": model, **own}, sets or ()) for model in models or (None,)]
    logs.set_up(configs[0].log_format, verbose=verbose)
    serve_here(configs, _say, verbose)


@app.command(context_settings={"allow_interspersed_args": False})
def submit(
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="COMMAND", help="What to run there, written as it is run here."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Its dashboard; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, here."),
    ] = None,
    submission_id: Annotated[str | None, typer.Option(metavar="ID", help="The job's name.", show_default=False)] = None,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Show its log, end with its exit code.")] = True,
    attach: Annotated[
        str | None, typer.Option(metavar="ID", help="Follow a job that was submitted before, instead of a new one.")
    ] = None,
    runtime_env: Annotated[Path | None, typer.Option(metavar="FILE", help="Ray's runtime environment, YAML.")] = None,
    working_dir: Annotated[str | None, typer.Option(metavar="DIR", help="Sent along; the job starts in it.")] = None,
    env: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="No secrets; may be repeated.")] = None,
    entrypoint_num_cpus: Annotated[
        float | None,
        typer.Option(metavar="N", help="CPUs for the driver, on any node.", show_default="none, on the head"),
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run a command as a job of a Ray cluster. Its id first, then its log, in the end its exit code."""
    from pipeline import submit as jobs

    logs.set_up(verbose=verbose)
    if bool(command) == bool(attach):
        raise UsageError("murmur submit needs a command to run, or --attach ID")
    if command:
        options = jobs.Options(submission_id, runtime_env, working_dir, tuple(env or ()), entrypoint_num_cpus)
        job = jobs.submit(_parsed(command), options, address, warn=_say)
    else:
        job = jobs.attach(attach or "", address)
    typer.echo(f"job {job.id} on {job.address}", err=as_json)
    code = _follow(job, err=as_json) if follow else EXIT_OK
    _finish(code, as_json, {"job": job.id, "status": job.status()})


@bench.command("engine")
def bench_engine(
    size: Annotated[str, typer.Option(help="Of the random weights: tiny, base, small ... large-v3-turbo.")] = "base",
    model: Model = None,
    windows: Annotated[int, typer.Option(help="How many windows of 30 s.")] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens of each window.")] = 100,
    rounds: Annotated[int, typer.Option(help="How often each takes its turn.")] = 3,
    lanes: Annotated[int | None, typer.Option(help="Of our engine.", show_default="auto")] = None,
    threads: Annotated[int | None, typer.Option(help="Of each.", show_default="all cores")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    contestants: Annotated[
        str | None, typer.Option(metavar="A,B", help="Also faster-whisper:int8.", show_default="all")
    ] = None,
    dtype: Annotated[str | None, typer.Option(metavar="A,B", help="Of ours.", show_default="auto,float32")] = None,
    batches: Annotated[str | None, typer.Option(metavar="N,N", help="To try.", show_default="1,4,8,16")] = None,
    parts: Annotated[str | None, typer.Option(metavar="A,B", help="What to measure.", show_default="all")] = None,
    recordings: Annotated[int, typer.Option(help="For sequential: how many at once.")] = 32,
    processes: Annotated[int, typer.Option(help="Of ours on the device at once, beside one alone.")] = 1,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures there too.")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Our engine beside others, in one run. faster-whisper, openai-whisper, transformers: same weights and windows."""
    from pipeline.bench.engine import Plan
    from pipeline.bench.engine import bench_engine as measure
    from pipeline.bench.table import show_engine

    logs.set_up(verbose=verbose)
    console = _console(as_json)
    lists = {"contestants": contestants, "dtypes": dtype, "parts": parts}
    given: dict[str, Any] = {name: tuple(text.split(",")) for name, text in lists.items() if text is not None}
    if batches is not None:
        given["batches"] = _whole_numbers("--batches", batches)
    plan = Plan(
        size=size, model=model, windows=windows, tokens=tokens, rounds=rounds, lanes=lanes, threads=threads,
        device=device, recordings=recordings, processes=processes, **given,
    )  # fmt: skip
    figures = measure(plan, say=_say)
    _write_figures(out, figures)
    show_engine(figures, console)
    _finish(EXIT_OK, as_json, figures)


@bench.command("job")
def bench_job(
    inputs: Annotated[
        list[str] | None, typer.Argument(metavar="INPUT", help="As transcribe's.", show_default="the demo's clips")
    ] = None,
    model: Model = None,
    config_file: ConfigFile = None,
    sets: Sets = None,
    hours: Annotated[float, typer.Option(help="Of the demo's clips.")] = 0.1,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures there too.")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """The job on this machine beside its engine alone: what decoding, Ray and committing leave of its speed."""
    from pipeline.bench.job import Plan
    from pipeline.bench.job import bench_job as measure

    logs.set_up(verbose=verbose)
    config = load_config(config_file, {"model": model or "demo"}, sets or ())
    options = [f"--model={config.model}", *(f"--config={file}" for file in [config_file] if file)]
    options += [f"--set={one}" for one in sets or ()]
    figures = measure(Plan(tuple(inputs or ()), config, tuple(options), hours), say=_say)
    _write_figures(out, figures)
    job, alone = figures["job"], figures["engine_alone"]
    _console(as_json).print(
        f"RTFx {job['rtfx']:.1f}, the engine alone {alone[0]['rtfx']:.1f} and {alone[1]['rtfx']:.1f}: "
        f"{100 * figures['share_of_engine']:.0f} %; start {job['start_s']:.1f} s, finalise {job['finalize_s']:.1f} s",
        highlight=False,
    )
    _finish(EXIT_OK, as_json, figures)


@bench.command("http")
def bench_http(
    url: Annotated[str, typer.Argument(metavar="URL", help="Of a running server, as murmur serve prints it.")],
    files: Annotated[
        list[str] | None, typer.Argument(metavar="FILE", help="Audio to send.", show_default="the demo's clips")
    ] = None,
    model: Model = None,
    clients: Annotated[int, typer.Option(help="Requests under way at once.")] = 8,
    duration_s: Annotated[float, typer.Option("--seconds", help="How long new ones are sent.")] = 60.0,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures there too.")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """A running server under load, as its clients see it. A token: the first of MURMUR_API_TOKENS."""
    import asyncio

    from pipeline.bench.http import Plan
    from pipeline.bench.http import bench_http as measure
    from pipeline.bench.table import show_http
    from pipeline.demo import sound_clips

    logs.set_up(verbose=verbose)
    plan = Plan(url.rstrip("/"), tuple(files or map(str, sound_clips())), model, clients, duration_s)
    figures = asyncio.run(measure(plan, say=_say))
    _write_figures(out, figures)
    show_http(figures, _console(as_json))
    _finish(EXIT_OK, as_json, figures)


# ---- what the commands share


def _write_figures(out: Path | None, figures: Mapping[str, Any]) -> None:
    if out is not None:
        _write(out, json.dumps(figures, indent=1) + "\n")


def _given(**options: Any) -> dict[str, Any]:
    """Those that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _whole_numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text!r}: whole numbers with commas between them") from None


def _parsed(arguments: Sequence[str]) -> Command:
    """A command line for a cluster, refused here where it would be refused there."""
    from pipeline.submit import Command

    name, *rest = arguments
    command = typer.main.get_command(app).commands.get(name)  # type: ignore[attr-defined]
    if name not in SUBMITTED or command is None:
        raise UsageError(f"murmur submit {name}: what runs on a cluster is {', '.join(SUBMITTED)}")
    given = command.make_context(f"murmur {name}", list(rest)).params
    if given["output"] is None:
        raise UsageError("murmur submit transcribe needs --output: nobody would read what it prints")
    file = given.get("config_file")
    load_config(file, {"model": given.get("model")}, given.get("sets") or ())
    inputs = [*(given.get("inputs") or ()), *(given[key] for key in ("reference", "against") if given.get(key))]
    return Command(tuple(arguments), tuple(inputs), given["output"], file)


def _follow(job: Job, err: bool) -> int:
    """The job's log, and its exit code. A signal ends the following, not the job."""
    try:
        return job.follow(lambda text: typer.echo(text, nl=False, err=err))
    except Stopped as stopped:
        there = f"--address {job.address}"
        _say(f"murmur: {stopped}; the job goes on. Follow it: murmur submit --attach {job.id} {there}")
        _say(f"stop it: ray job stop {job.id} {there}")
        raise typer.Exit(stopped.exit_code) from None


def _run(inputs: Sequence[str], output: str, config: Config, console: Console, **how: bool) -> Summary:
    from pipeline.job import run

    return run(inputs, output, config, console=console, **how)


def _open(output: str) -> Any:
    from pipeline.output import read_output

    return read_output(output)


def _evaluated(output: str) -> Iterator[Section]:
    """The page's section of word errors, where the tables are there and hold references."""
    from pipeline import evaluation, evaluation_report

    result = _open(output)
    if result.store.sizes("recordings") and evaluation.has_references(result):
        yield evaluation_report.section(evaluation.evaluate(result, most=evaluation_report.PAGE_RECORDINGS))


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror or error}") from None


def _show_end(summary: Summary, output: str, config: Config, console: Console) -> None:
    import shlex

    from pipeline import report

    result = _open(output)
    report.show_summary(summary, result, console)
    if summary.counts["failed"]:
        report.show_failures(result, console)
        if summary.exit_code == EXIT_FAILED:
            console.print(report.why_failed(summary.counts, config), highlight=False)
        again = f"Once the cause is gone: murmur retry {shlex.quote(output)}"
        console.print(again, markup=False, highlight=False, soft_wrap=True)  # to be copied whole
    closer = f"Look closer with: murmur report {shlex.quote(output)} --html report.html"
    console.print(closer, markup=False, highlight=False, soft_wrap=True)


def _warn_of_demo(config: Config) -> None:
    if (config.model, config.engine) == ("demo", "local"):
        _say(
            "The demo model knows a small synthetic vocabulary in three languages, and writes nonsense for real speech."
        )


def _show_estimate(
    inputs: Sequence[str], output: str, config: Config, console: Console, check_inputs: bool
) -> Mapping[str, Any]:
    from pipeline.job import estimate
    from pipeline.report import number_of
    from pipeline.report_page import length

    found = estimate(inputs, output, config, check_inputs=check_inputs)
    lengths = []
    if found.hinted_s:
        lengths.append(f"{length(found.hinted_s)} as the manifest says")
    if found.guessed_s:
        lengths.append(f"about {length(found.guessed_s)} going by file sizes")
    if found.unknown:
        lengths.append(f"{found.unknown} of unknown length")
    console.print(
        f"{found.missing} of {number_of(found.inputs)} to do{': ' if lengths else ''}{' and '.join(lengths)}",
        highlight=False,
    )
    return dataclasses.asdict(found)


def _print_transcripts(
    inputs: Sequence[str], config: Config, format: Format, as_json: bool
) -> tuple[int, bool, Mapping[str, Any]]:
    """Each recording's transcript on stdout as soon as it is there, without Ray."""
    from pipeline.engine import engine_config, load_engine
    from pipeline.formats import FORMATS, verbose
    from pipeline.manifest import read_inputs
    from pipeline.report_page import reason

    recordings = list(read_inputs(inputs))
    objects, code = [], EXIT_OK
    with load_engine(engine_config(config)) as engine:
        _say(f"engine: {engine.info}")
        _warn_of_demo(config)
        for transcript in _transcripts(recordings, engine, config):
            failure = dataclasses.asdict(transcript.failure) if transcript.failure else None
            status = {"id": transcript.recording.id, "status": transcript.status, "failure": failure}
            objects.append({**status, **verbose(transcript)})
            if not as_json:
                if len(recordings) > 1:  # on stderr, so that stdout is the transcripts and nothing else
                    typer.echo(f"{transcript.recording.id}:", err=True)
                sys.stdout.write(FORMATS[format.value](transcript))
                sys.stdout.flush()
            if transcript.failure is not None:
                code = EXIT_FAILED
                why = reason(transcript.recording.id, transcript.failure.message)
                _say(f"{transcript.recording.id}: {transcript.failure.kind}: {why}")
    return code, as_json, {"transcripts": objects}


def _transcripts(recordings: Sequence[Any], engine: Engine, config: Config) -> Iterator[Transcript]:
    from pipeline.transcribe import transcribe as transcribe_one

    for recording in recordings:
        yield transcribe_one(recording, engine, config.decode_options(), config)


def _expected_failures(manifest: Path) -> set[str]:
    """The ids of the clips that are damaged on purpose."""
    lines = (json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines() if line.strip())
    return {line["id"] for line in lines if line.get("expected") == "failed"}


def _finish(code: int, as_json: bool, result: Mapping[str, Any]) -> NoReturn:
    if as_json:
        typer.echo(json.dumps({**result, "exit_code": code}, ensure_ascii=False))
    raise typer.Exit(code)


def _console(as_json: bool) -> Console:
    """Where words for a person go: stdout, unless that is for a program."""
    from rich.console import Console

    return Console(stderr=as_json, soft_wrap=not sys.stdout.isatty())


def _say(line: str) -> None:
    print(redact(line), file=sys.stderr)


@contextmanager
def _one_line_errors(verbose: bool) -> Iterator[None]:
    """Whatever ends a command becomes a line and an exit code."""
    try:
        yield
    except MurmurError as error:
        if verbose:
            traceback.print_exc()
        _say(f"murmur: {error}")
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `murmur ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_UNEXPECTED)
    except Exception as error:
        if verbose:
            traceback.print_exc()
        lines = str(error).strip().splitlines()
        _say(f"murmur: unexpected {type(error).__name__}: {lines[0] if lines else ''} (see {_write_log()})")
        sys.exit(EXIT_UNEXPECTED)


def _write_log() -> str:
    """The traceback in a file of its own."""
    handle, path = tempfile.mkstemp(prefix="murmur-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(redact(traceback.format_exc()))
    return path


def script() -> NoReturn:
    """The console script: `main`, and an exit code that nothing can change any more.

    Threads of C++ libraries outlive their work, and the interpreter's own end can abort the process under them
    ("terminate called without an active exception"): of some twenty finished runs on a busy machine two ended with 134
    in place of 0. So the process ends here, by itself.
    """
    code: object = EXIT_OK
    try:
        main()
    except SystemExit as ended:
        code = ended.code
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or nobody reads it any more
            stream.flush()
    os._exit(code if isinstance(code, int) else EXIT_OK if code is None else EXIT_UNEXPECTED)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command. Always ends in `SystemExit`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with stop_on_signals(), _one_line_errors("--verbose" in arguments):
            app(arguments)
    except Stopped as stopped:
        commits = any(one.startswith("--output") for one in arguments) or arguments[:1] != ["transcribe"]
        resumes = commits and arguments[:1] not in (["serve"], ["bench"])
        _say(f"murmur: {stopped}{'; what is committed stays, the same command goes on from there' if resumes else ''}")
        sys.exit(stopped.exit_code)


if __name__ == "__main__":
    script()
