"""The command as a user meets it: what it prints where, its exit codes, and no traceback whatever happens."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from audio_files import tone, write_wav
from commands import FAKE, command, last_json, murmur

from pipeline import cli
from pipeline.errors import EXIT_FAILED, EXIT_MISMATCH, EXIT_OK, EXIT_USAGE
from pipeline.signals import Stopped


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`murmur ...` within this process: (exit code, stdout, stderr)."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        assert "Traceback" not in out + err
        return code, out, err

    return run


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_wav(tmp_path / "a.wav", tone(300, 2.0))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["transcrib", "a.wav"], "Did you mean 'transcribe'?"),
        (["transcribe", "a.wav", "--outptu", "x"], "--output"),
        (["transcribe", "a.wav", "--jsno"], "--json"),
        (["transcribe"], "INPUT"),
        (["transcribe", "a.wav", "--format", "pdf"], "srt"),
        (["transcribe", "a.wav", "--set", "modle=x"], "did you mean 'model'?"),
        (["transcribe", "a.wav", "--set", "chunk_length_s=99"], "chunk_length_s"),
        (["transcribe", "a.wav", "--config", "no-such.yaml"], "no-such.yaml"),
        (["transcribe", "a.wav", "--dry-run"], "--output"),
        (["transcribe", "a.wav", "--output", "out", "--format", "srt"], "murmur export out --format srt --to DIR"),
        (["transcribe", "no-such.wav", "--set", "engine=fake"], "no-such.wav"),
        (["transcribe", "no-such.jsonl", "--output", "out"], "no-such.jsonl: not found"),
        (["transcribe", "no-such.jsonl", "--output", "out", "--model", "/no/such/model"], "no-such.jsonl"),
        (["retry", "no-such-output"], "no run was begun here"),
        (["finalize", "no-such-output"], "no run was begun here"),
        (["report", "no-such-output"], "no run was begun here"),
        (["evaluate", "no-such-output"], "no run was begun here"),
        (["evaluate", "no-such-output", "--worst", "-1"], "--worst"),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, list) else "",
)
def test_misuse_is_told_and_ends_with_2(
    call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    arguments: list[str], said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*arguments)
    assert (code, out) == (EXIT_USAGE, "")
    assert said in err
    assert list(tmp_path.iterdir()) == []


def test_the_version_is_told(call: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = call("--version")
    assert (code, err) == (EXIT_OK, "")
    assert re.fullmatch(r"murmuration \d+\.\d+\.\d+\n", out)


def test_help_says_each_command_in_whole_sentences(call: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = call("--help")
    commands = out.partition("Commands:\n")[2].strip().splitlines()
    assert code == EXIT_OK
    assert len(commands) >= 12
    assert all(line.endswith(".") and not line.endswith("...") for line in commands)


def test_a_file_that_fails_is_named_once(call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    (tmp_path / "liar.wav").write_text("no audio")
    code, out, err = call("transcribe", tmp_path / "liar.wav", *FAKE)
    assert (code, out) == (EXIT_FAILED, "")
    assert err.count("liar.wav") == 1


def test_a_dry_run_says_only_what_it_knows(call: Callable[..., tuple[int, str, str]], clip: Path) -> None:
    code, out, _ = call("transcribe", clip, "--output", clip.parent / "out", "--dry-run", *FAKE)
    assert (code, out) == (EXIT_OK, "1 of 1 recording to do: about 2.0 s going by file sizes\n")
    assert not (clip.parent / "out").exists()


def test_ray_that_does_not_start_in_time_is_told(
    call: Callable[..., tuple[int, str, str]], clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # by a test before
    code, out, err = call("transcribe", clip, "--output", clip.parent / "out", *FAKE)
    assert (code, out) == (EXIT_FAILED, "")
    assert "Ray did not start" in err
    assert "the same command tries again" in err


def test_a_bad_line_is_named(call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"audio_filepath": "a.wav"}\n{"audio_filepath": "b.wav"\n')
    code, _, err = call("transcribe", manifest, "--output", tmp_path / "out", *FAKE)
    assert code == EXIT_USAGE
    assert f"{manifest}:2" in err
    assert len(err.splitlines()) == 1


def test_a_model_that_is_not_there(call: Callable[..., tuple[int, str, str]], clip: Path, tmp_path: Path) -> None:
    for more in ([], ["--output", tmp_path / "out"]):
        code, out, err = call("transcribe", clip, "--model", "openai/whisper-no-such-size", *more)
        assert (code, out) == (EXIT_USAGE, "")
        assert "--model demo" in err  # offline, nothing cached: what to do instead
        assert len(err.splitlines()) == 1


def test_text_comes_on_stdout_and_reasons_on_stderr(
    call: Callable[..., tuple[int, str, str]], clip: Path, tmp_path: Path
) -> None:
    code, out, err = call("transcribe", clip, *FAKE)
    assert code == EXIT_OK
    assert re.fullmatch(r"engine: \S+ in float32 on cpu, 8 lanes of 0 MB\n", err)
    assert len(out.split()) == 4  # two words a second
    (tmp_path / "empty.wav").touch()
    code, out_of_both, err = call("transcribe", clip, tmp_path / "empty.wav", *FAKE)
    assert (code, out_of_both) == (EXIT_FAILED, out)
    assert f"{tmp_path / 'empty.wav'}: empty_audio: " in err


@pytest.mark.parametrize(
    ("format", "start"),
    [("srt", "1\n00:00:00,000 --> 00:00:02,000\n"), ("vtt", "WEBVTT\n"), ("tsv", "start\tend\ttext\n")],
)
def test_formats(call: Callable[..., tuple[int, str, str]], clip: Path, format: str, start: str) -> None:
    code, out, _ = call("transcribe", clip, "--format", format, *FAKE)
    assert code == EXIT_OK
    assert out.startswith(start)


def test_json_is_the_last_line(call: Callable[..., tuple[int, str, str]], clip: Path) -> None:
    code, out, _ = call("transcribe", clip, "--json", *FAKE)
    (transcript,) = json.loads(out.splitlines()[-1])["transcripts"]
    assert (code, transcript["id"], transcript["duration"]) == (EXIT_OK, str(clip), 2.0)
    assert json.loads(call("transcribe", clip, "--format", "json", *FAKE)[1])["text"] == transcript["text"]


def test_a_dry_run(call: Callable[..., tuple[int, str, str]], clip: Path, tmp_path: Path) -> None:
    code, out, _ = call("transcribe", clip, "--output", tmp_path / "out", "--dry-run", "--json", *FAKE)
    assert code == EXIT_OK
    assert json.loads(out)["missing"] == 1
    assert not (tmp_path / "out").exists()


def test_the_unexpected_is_one_line_and_a_log(
    call: Callable[..., tuple[int, str, str]], clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("at https://user:secret@host/x?token=hidden\nand more")

    monkeypatch.setattr("pipeline.engine.load_engine", broken)
    code, out, err = call("transcribe", clip, *FAKE)
    assert (code, out) == (cli.EXIT_UNEXPECTED, "")
    assert err.startswith("murmur: unexpected ZeroDivisionError: at https://host/x")
    assert len(err.splitlines()) == 1
    log = Path(err.partition("(see ")[2].rstrip(")\n"))
    written = log.read_text()
    log.unlink()
    assert "Traceback" in written
    assert "secret" not in err + written
    assert "hidden" not in err + written


def test_help_and_a_mistyped_option_load_nothing_heavy() -> None:
    script = (
        "import sys; from pipeline import cli\n"
        "try: cli.main(['transcribe', '--help'])\n"
        "except SystemExit: pass\n"
        "print({'ray', 'torch', 'av', 'transformers', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    assert "--output" in done.stdout


def test_commands_of_later_are_not_there(call: Callable[..., tuple[int, str, str]]) -> None:
    for name in ("serve", "verify", "clean", "export", "submit"):
        assert call(name)[0] == EXIT_USAGE


@pytest.mark.ray
def test_a_run_from_begin_to_end(ray_cluster: None, call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """transcribe, again, report, evaluate, retry, finalize, another configuration: one output, one story."""

    def told(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
        code, out, _ = call(*arguments, "--json")
        result = json.loads(out.splitlines()[-1])
        assert result["exit_code"] == code
        return code, result

    for i in range(3):
        write_wav(tmp_path / f"{i}.wav", tone(300 + i, 1.0))
    (tmp_path / "3.wav").touch()
    lines = [{"audio_filepath": f"{i}.wav", "id": str(i), "text": "amber birch" if i != 2 else None} for i in range(4)]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    job = ("transcribe", manifest, "--output", out, *FAKE)

    code, first = told(*job)
    assert (code, first["ok"], first["failed"], first["this_run"]["recordings"]) == (EXIT_FAILED, 3, 1, 4)
    code, said, _ = call(*job)
    assert code == EXIT_FAILED
    assert "nothing was left to do" in said
    assert "3: empty_audio: " in said

    code, overview = told("report", out)
    assert (code, overview["ok"], overview["failed"], overview["tables"]) == (EXIT_OK, 3, 1, "complete")
    assert overview["failures"] == {"empty_audio": 1}
    _, wer = told("evaluate", out)
    assert (wer["scored"], wer["words"], wer["failed"], wer["without_reference"]) == (2, 4, 1, 1)
    assert wer["wer"] == wer["by_language"]["en"] == wer["languages"][0]["wer"]
    assert "language en" in call("evaluate", out)[1]

    write_wav(tmp_path / "3.wav", tone(500, 1.0))
    code, retried = told("retry", out)
    assert (code, retried["ok"], retried["failed"]) == (EXIT_OK, 4, 0)
    code, finalized = told("finalize", out)
    assert (code, finalized["complete"]) == (EXIT_OK, True)

    code, _, err = call(*job, "--set", "language=de")
    assert code == EXIT_MISMATCH
    assert "language: None there, 'de' here" in err


def test_the_exit_code_stands_whatever_the_interpreters_end_does() -> None:
    """Stands in for the threads of a C++ library, which abort there now and then."""
    abort = "import atexit, os, sys; atexit.register(os.abort); sys.argv[1:] = {!r}; "
    run = abort + "from pipeline.cli import script; script()"
    for arguments, code in ((["--help"], EXIT_OK), (["report", "no/such/output"], EXIT_USAGE)):
        done = subprocess.run([sys.executable, "-c", run.format(arguments)], capture_output=True, text=True)
        assert done.returncode == code
        assert "Usage" in done.stdout if code == EXIT_OK else "no run was begun here" in done.stderr


def test_a_signal_where_nothing_is_committed_promises_nothing(
    call: Callable[..., tuple[int, str, str]], clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise Stopped(signal.SIGINT)

    monkeypatch.setattr(cli, "_print_transcripts", stop)
    assert call("transcribe", clip, *FAKE) == (130, "", "murmur: stopped by SIGINT\n")


@pytest.mark.parametrize(("first", "second"), [("SIGTERM", "SIGINT"), ("SIGINT", "SIGTERM"), ("SIGTERM", "SIGTERM")])
def test_a_second_signal_ends_the_process_at_once(first: str, second: str) -> None:
    """Whatever it does about the first; what a process that is killed leaves, the kill series goes on from."""
    code = """
import time
from pipeline.signals import Stopped, stop_on_signals
with stop_on_signals():
    try:
        print("at work", flush=True)
        time.sleep(60)
    except Stopped as stopped:
        print(stopped, flush=True)
        time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        process.send_signal(signal.Signals[first])
        assert process.stdout.readline() == f"stopped by {first}\n"
        process.send_signal(signal.Signals[second])
        assert process.wait(30) == -signal.Signals[second]


@pytest.mark.ray
def test_a_signal_ends_the_run_and_it_can_go_on(tmp_path: Path) -> None:
    """Ctrl-C. `test_submit` has SIGTERM, as Ray sends it to a job that is stopped."""
    for i in range(6):
        write_wav(tmp_path / "in" / f"{i}.wav", tone(300 + i, 1.0))
    hang = "fake.faults=[{match: '*/5.wav', kind: hang, times: 1}]"
    job = ("transcribe", tmp_path / "in", "--output", tmp_path / "out", *FAKE, "--set", hang)
    started = tmp_path / "out" / "_run" / "faults"
    with subprocess.Popen(command(*job), stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        deadline = time.monotonic() + 120
        while not list(started.glob("*")):  # the last file hangs in the engine
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopped by SIGINT; what is committed stays, the same command goes on from there" in err
    assert "Traceback" not in err
    done = murmur(*job, "--json")
    assert done.returncode == EXIT_OK, done.stderr
    assert "core_worker" not in done.stderr
    assert last_json(done)["ok"] == 6
