"""Log lines: one each, without secrets, with the recording they are about, for a person and for a program."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator

import pytest

from pipeline import logs

SECRET = "https://user:hunter2@host/a.wav?X-Amz-Signature=abc&key=s3cr3t"


Said = Callable[[], list[str]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Iterator[Said]:
    """The lines that went to stderr since it was last asked; the root logger is as before afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("pipeline")
    handlers, level = list(root.handlers), ours.level
    yield lambda: capsys.readouterr().err.splitlines()
    root.handlers[:] = handlers
    ours.setLevel(level)


log = logging.getLogger("pipeline.test")


def test_a_line_for_a_person(said: Said) -> None:
    logs.set_up()
    with logs.about("calls/7.wav"):
        log.warning("could not read %s", SECRET)
    log.info("on")
    log.debug("not this")
    first, second = said()
    assert first.endswith(" WARNING [calls/7.wav] could not read https://host/a.wav")
    assert second.endswith(" INFO on")


def test_a_line_for_a_program(said: Said) -> None:
    logs.set_up("json", verbose=True)
    log.debug("failed", extra={"recording": "a\nb", "kind": "not_found", "stage": "decode", "attempts": 3})
    with logs.about("outer"):
        log.info("x")
    first, second = map(json.loads, said())
    assert {**first, "time": 0} == {
        "time": 0, "level": "DEBUG", "logger": "pipeline.test", "message": "failed", "recording": "a\nb",
        "kind": "not_found", "stage": "decode", "attempts": 3,
    }  # fmt: skip
    assert (second["recording"], "kind" in second) == ("outer", False)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_whatever_a_message_holds_is_one_line(said: Said, log_format: logs.LogFormat) -> None:
    logs.set_up(log_format)
    with logs.about("x\ny\u2028z\x1b[31m"):
        log.error("first\r\nFATAL second\x00\x1b[2J %s", "é ü 日本")
        try:
            raise ValueError(f"of {SECRET}\nand more")
        except ValueError:
            log.exception("it broke")
    lines = said()
    assert len(lines) == 2
    assert "é ü 日本" in (lines[0] if log_format == "text" else json.loads(lines[0])["message"])
    assert "ValueError" in lines[1]
    assert "hunter2" not in lines[1]
    assert "s3cr3t" not in lines[1]
    assert all(c.isprintable() for line in lines for c in line)


def test_a_very_long_message_is_cut(said: Said) -> None:
    logs.set_up()
    log.warning("x" * 1_000_000)
    assert len(said()[0]) < 5_000


def test_setting_up_again_does_not_double_lines(said: Said) -> None:
    logs.set_up()
    logs.set_up("json")
    log.warning("once")
    assert [json.loads(line)["message"] for line in said()] == ["once"]


def test_each_task_speaks_of_its_own_recording(said: Said) -> None:
    logs.set_up("json")

    async def one(name: str) -> None:
        with logs.about(name):
            for _ in range(3):
                await asyncio.sleep(0)
                log.info(name)

    async def both() -> None:
        await asyncio.gather(one("a"), one("b"))

    asyncio.run(both())
    lines = [json.loads(line) for line in said()]
    assert len(lines) == 6
    assert all(line["recording"] == line["message"] for line in lines)


def test_a_generator_closed_elsewhere_keeps_nothing() -> None:
    def items() -> Iterator[int]:
        with logs.about("inside"):
            yield 1

    running = items()
    next(running)
    asyncio.run(asyncio.to_thread(running.close))  # type: ignore[arg-type]
    record = logging.LogRecord("x", logging.INFO, "", 0, "m", (), None)
    assert logs.fields_of(record).get("recording") in (None, "inside")
