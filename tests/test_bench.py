"""`murmur bench engine`: its figures' shape and the tokens that each contestant really gives; never times."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from pipeline import cli
from pipeline.bench import engine as bench
from pipeline.bench import ours as ours_bench
from pipeline.bench.engine import LIBRARIES, PARTS, Plan, bench_engine, to_as_many_tokens
from pipeline.bench.ours import spread
from pipeline.bench.rounds import quotient
from pipeline.bench.seats import Seat, Sitting, synthetic_windows
from pipeline.bench.table import show_engine
from pipeline.engine.contestants import CONTESTANTS, Ours, Setting, Spec, write_models
from pipeline.engine.floors import encoder_flop
from pipeline.engine.model import Dims
from pipeline.engine.probe import STAGES, Clocks
from pipeline.engine.random_checkpoint import Shape, write_random_checkpoint
from pipeline.errors import EXIT_OK, EXIT_USAGE, EngineError, UsageError
from pipeline.types import SAMPLE_RATE

TINY = Shape(width=64, heads=1, encoder_layers=1, decoder_layers=2)
N_TOKENS = 9


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("bench") / "tiny", TINY)


class InlineSeat:
    """A seat in this process, where torch and the other runtimes are imported once for all tests."""

    def __init__(self, threads: int) -> None:
        self._sitting = Sitting()

    def ask(self, method: str, *arguments: Any) -> Any:
        return getattr(self._sitting, method)(*arguments)

    def begin(self, method: str, *arguments: Any) -> None:
        self._asked = (method, *arguments)

    def answer(self) -> Any:
        return self.ask(*self._asked)

    def close(self) -> None:
        self._sitting.close()

    def __enter__(self) -> InlineSeat:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@contextmanager
def in_this_process() -> Iterator[None]:
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "Seat", InlineSeat)
        patch.setattr(bench, "PAUSE_S", 0.0)
        patch.setattr(ours_bench, "PAUSE_S", 0.0)
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def inline() -> Iterator[None]:
    with in_this_process():
        yield


def small(checkpoint: Path, **more: Any) -> Plan:
    plan = {"windows": 2, "tokens": N_TOKENS, "rounds": 1, "lanes": 2, "recordings": 2, "batches": (1, 2)}
    return Plan(**({"model": str(checkpoint), "dtypes": ("float32",)} | plan | more))


@pytest.fixture(scope="module")
def figures(checkpoint: Path) -> dict[str, Any]:
    """Of everybody and every part."""
    with in_this_process():
        return bench_engine(small(checkpoint, processes=2))


def test_everybody_gives_as_many_tokens(figures: dict[str, Any]) -> None:
    raced = {(entry["library"], entry["dtype"]): entry for entry in figures["contestants"]}
    assert {library for library, _ in raced} == set(LIBRARIES)
    assert all(entry["tokens_per_window"] == {"min": N_TOKENS, "max": N_TOKENS} for entry in raced.values())
    # In float32 the same weights under the same rules say the same: nobody is spared any work.
    assert raced["openai-whisper", "float32"]["same_tokens"] == 1.0
    assert raced["faster-whisper", "float32"]["same_tokens"] == 1.0
    assert set(figures["ratios"]) == {*LIBRARIES, "openai-whisper, its own call"} - {"ours"}
    settings = {entry["setting"] for entry in figures["contestants"] if entry["library"] == "openai-whisper"}
    assert "alone" in settings


def test_every_part_has_its_figures(figures: dict[str, Any]) -> None:
    assert set(PARTS) - {"race"} <= set(figures)
    assert figures["machine"]["versions"]["torch"]
    json.dumps(figures)
    # A stage whose method has another name now would count nothing.
    assert set(figures["stages"]["calls"]) == set(STAGES)
    assert all(figures["stages"]["calls"].values())
    assert set(figures["stages"]["s_per_window"]) == {*STAGES, "host"}


def test_the_floors_and_several_processes(figures: dict[str, Any]) -> None:
    stages = figures["floors"]["stages"]
    assert set(stages) == {"mel", "encoder", "prefill", "step"}
    assert all(stage["floor_s"] > 0 and stage["share_of_floor"] > 0 for stage in stages.values())
    assert figures["processes"]["processes"] == 2
    assert figures["processes"]["times_one"]["by_cpu_time"] > 0


def test_refilled_lanes_need_fewer_steps(figures: dict[str, Any]) -> None:
    found = figures["spread"]
    assert found["windows"] == 16 * figures["memory"]["lanes"] == 32
    assert found["refilled"]["steps"] < found["static"]["steps"]


def test_both_algorithms_do_the_same_work(figures: dict[str, Any]) -> None:
    kinds = figures["sequential"]
    for kind in ("windows", "sequential", "sequential_conditioned"):
        assert (kinds[kind]["windows"], kinds[kind]["tokens"]) == (6, 6 * N_TOKENS)
    assert kinds["sequential_conditioned"]["prompt_tokens"] > kinds["sequential"]["prompt_tokens"]


def test_the_table_fits_a_terminal(figures: dict[str, Any]) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    show_engine(figures, console)
    text = console.export_text()
    assert "…" not in text
    named = [f"{entry['library']} {entry['dtype']}" for entry in figures["contestants"]]
    for line in (
        *named,
        "stages, ms a window",
        "share of the device",
        "2 processes at once",
        "refilled lanes",
        "VAD: ",
        "machine: ",
        "sequential, 2 recordings",
    ):
        assert line in text


def test_the_command(
    inline: None, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A runtime that is not installed, and one that fails, are named; the rest is measured."""
    monkeypatch.setattr("pipeline.engine.contestants.find_spec", lambda name: None if name == "whisper" else True)

    def broken(spec: Spec) -> None:
        raise EngineError("no such luck")

    monkeypatch.setitem(CONTESTANTS, "transformers", broken)
    out = tmp_path / "figures.json"
    arguments = f"bench engine --model {checkpoint} --windows 1 --tokens 4 --rounds 1 --lanes 1 --batches 1 --threads 1"
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments.split(), "--dtype", "float32", "--parts", "race", "--out", str(out), "--json"])
    assert ended.value.code == EXIT_OK
    stdout, stderr = capsys.readouterr()
    figures = json.loads(stdout.splitlines()[-1])
    assert json.loads(out.read_text()) == {key: value for key, value in figures.items() if key != "exit_code"}
    assert figures["missing"] == {"openai-whisper": "not installed"}
    errors = {entry["library"]: entry["error"] for entry in figures["contestants"]}
    assert errors == {"ours": None, "faster-whisper": None, "transformers": "no such luck"}
    assert set(figures["ratios"]) == {"faster-whisper"}
    assert "openai-whisper: not installed" in stderr
    assert "transformers float32: failed: no such luck" in stderr


def test_ours_may_not_fail(inline: None, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(spec: Spec) -> None:
        raise EngineError("no such luck")

    monkeypatch.setitem(CONTESTANTS, "ours", broken)
    with pytest.raises(EngineError, match="no such luck"):
        bench_engine(small(checkpoint, contestants=("ours",)))


def test_a_dtype_that_comes_to_the_same_is_not_raced_twice(inline: None, checkpoint: Path) -> None:
    plan = small(checkpoint, contestants=("ours",), dtypes=("auto", "float32", "float32"), parts=("race",))
    dtypes = [entry["dtype"] for entry in bench_engine(plan)["contestants"]]
    assert len(dtypes) == len(set(dtypes))
    assert "auto" not in dtypes


def test_one_dtype_of_a_library() -> None:
    plan = Plan(contestants=("faster-whisper:int8", "ours", "transformers"), dtypes=("auto",))
    found = {library: plan.dtypes_of(library) for library in plan.libraries}
    assert found == {"faster-whisper": ["int8"], "ours": ["auto"], "transformers": ["float32", "bfloat16"]}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--size bse", "'bse' is none of tiny, base"),
        ("--contestants ours,whisperx", "'whisperx' is none of ours, faster-whisper"),
        ("--contestants faster-whisper", "ours must be among them"),
        ("--contestants ours,faster-whisper:int4", "'int4' is none of int8, float32"),
        ("--parts speed", "'speed' is none of race"),
        ("--tokens 225", "1 ... 224"),
        ("--windows 0", "begin at 1"),
        ("--batches 4,many", "--batches '4,many'"),
        ("--device tpu", "'tpu' is none of cpu, cuda"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "engine", *arguments.split()])
    assert ended.value.code == EXIT_USAGE
    assert said in capsys.readouterr().err


def test_side_by_side(checkpoint: Path, tmp_path: Path) -> None:
    """faster-whisper's batches in threads of their own come back in order."""
    folder, converted = write_models("", str(checkpoint), str(tmp_path), convert=True)
    theirs = CONTESTANTS["faster-whisper"](Spec("faster-whisper", "float32", folder, converted, threads=2))
    windows = synthetic_windows(4)
    settings = theirs.settings([1, 2, 4], len(windows))
    assert Setting(2, side_by_side=2) in settings
    assert Setting(4, side_by_side=2) not in settings  # too few windows for two batches of four
    one_by_one, at_once = (theirs.run(windows, 30, Setting(2, n)) for n in (1, 2))
    assert at_once.tokens == one_by_one.tokens
    assert len({tuple(tokens) for tokens in at_once.tokens}) > 1


# -- figures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "stages", "expected"),
    [
        ([[1] * 10, [1] * 10], {"encoder": 1.0, "decoder": 3.0}, 1.0),
        ([[1] * 5, [1] * 5], {"encoder": 1.0, "decoder": 3.0}, 1.75),  # the decoder's three quarters twice
        ([[1] * 5, [1] * 15], {"encoder": 1.0, "decoder": 3.0}, 1.0),  # their mean is right
        ([[1] * 5, [1] * 5], {}, 2.0),  # nothing known of the stages: all of it is scaled
        ([[], []], {"encoder": 1.0, "decoder": 3.0}, 1.0),
    ],
)
def test_other_numbers_of_tokens(tokens: Any, stages: dict[str, float], expected: float) -> None:
    assert to_as_many_tokens({"tokens": tokens, "stages": stages}, 10) == expected


def test_quotients_are_taken_within_a_round() -> None:
    """The machine was half as fast in the second round: that meets both."""
    slow = [{"wall_s": 3.0, "cpu_s": 4.0}, {"wall_s": 6.0, "cpu_s": 4.0}]
    fast = [{"wall_s": 2.0, "cpu_s": 1.0}, {"wall_s": 4.0, "cpu_s": 1.0}]
    assert quotient(slow, fast) == {"median": 1.5, "min": 1.5, "max": 1.5, "by_cpu_time": 4.0}


def test_the_spread() -> None:
    lengths = spread(10, 220, 64)
    assert sorted(lengths) == sorted(spread(10, 220, 64))
    assert (min(lengths), max(lengths), len(lengths)) == (10, 220, 64)
    assert lengths != sorted(lengths)


def test_windows_are_loud_and_different() -> None:
    a, b = synthetic_windows(2)
    assert len(a) == 30 * SAMPLE_RATE
    assert abs(a).max() > 3276  # -20 dBFS: louder than any gate
    assert (a != b).any()
    assert (synthetic_windows(1)[0] == a).all()


def test_a_nested_stage_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr("pipeline.engine.probe.now", lambda: next(ticks) * np.array([1.0, 10.0]))
    clocks = Clocks(torch.device("cpu"))
    inner = clocks._timed("rules", lambda: None)  # from 1 to 2
    outer = clocks._timed("step", lambda: inner())  # from 0 to 3
    outer()
    assert (clocks.spent["rules"].tolist(), clocks.spent["step"].tolist()) == ([1.0, 10.0], [2.0, 20.0])
    assert (clocks.calls["rules"], clocks.calls["step"]) == (1, 1)


def test_clocks_are_taken_off_again() -> None:
    def methods() -> list[Callable[..., Any]]:
        return [getattr(owner, name) for stage in STAGES.values() for owner, name in stage]

    plain = methods()
    with suppress(ZeroDivisionError), Clocks(torch.device("cpu")).running():
        assert all(a is not b for a, b in zip(methods(), plain, strict=True))
        _ = 1 / 0
    assert methods() == plain


def test_the_encoder_s_arithmetic(checkpoint: Path) -> None:
    """Against torch's own count of the reference's encoder."""
    from torch.utils.flop_counter import FlopCounterMode
    from whisper.model import disable_sdpa

    from pipeline.demo.train.convert import to_openai

    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), disable_sdpa(), counter:
        to_openai(checkpoint).encoder(torch.zeros(1, 80, 3000))
    dims = Dims.of(json.loads((checkpoint / "config.json").read_text()))
    assert encoder_flop(dims) == counter.get_total_flops()


def test_ours_says_what_it_weighs(checkpoint: Path) -> None:
    sitting = Sitting()
    sitting.load(Spec("ours", "float32", str(checkpoint), lanes=2))
    facts = sitting.facts()
    sitting.close()
    on_disk = (checkpoint / "model.safetensors").stat().st_size
    assert 0.98 < facts["weights_bytes"] / on_disk < 2.02  # the embedding may lie there a second time, packed
    assert facts["lane_bytes"] == 2 * TINY.decoder_layers * TINY.width * (448 + 1500) * 4


# -- seats ---------------------------------------------------------------------------------------------------


def test_a_seat_is_a_process_that_answers() -> None:
    with Seat(threads=1) as seat:
        assert seat.ask("peak_rss_mb") > 1
        with pytest.raises(EngineError, match=r"AttributeError: .*no_such_thing"):
            seat.ask("no_such_thing")
        assert seat.ask("peak_rss_mb") > 1  # a failed question costs nothing else
        pid = seat._process.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="the process ended with -9"):
            seat.ask("peak_rss_mb")


def test_an_error_that_names_what_to_do_arrives_as_it_is() -> None:
    with Seat(threads=1) as seat, pytest.raises(UsageError, match="no such folder"):
        seat.ask("write_models", "base", "/no/such/folder", "", False)


def test_ours_is_asked_for_just_so_many_tokens(checkpoint: Path) -> None:
    """Ours in two batches' worth of windows over one lane: refilling changes no token."""
    ours = Ours(Spec("ours", "float32", str(checkpoint), lanes=1))
    windows = synthetic_windows(3)
    together = ours.run(windows, 5, Setting(1)).tokens
    alone = [ours.run([pcm], 5, Setting(1)).tokens[0] for pcm in windows]
    ours.engine.close()
    assert together == alone
    assert [len(tokens) for tokens in together] == [5, 5, 5]
