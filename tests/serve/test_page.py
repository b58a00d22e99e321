"""The page in a real browser: by keyboard and by drop, while the answer is still coming, and where it fails."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import random
import re
import shutil
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests
import uvicorn
from application import MODEL, Serve, clip
from audio_files import tone, write_wav
from commits import segment
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from playwright.sync_api import Browser, ConsoleMessage, FileChooser, Locator, Page, expect, sync_playwright

from pipeline.formats import FORMATS, timestamp, verbose
from pipeline.types import SAMPLE_RATE, Recording, Segment, Transcript
from serve_app.auth import Tokens

PAGE = Path(__file__).parents[2] / "serve_app" / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HOSTILE = (
    "<script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title = 'owned'\">",
    "00:00:01,000 --> 00:00:02,000 &amp; {{ 7 * 7 }}",
    " a\ttab, a line\n\n2\nand \u2028 a separator\x1c ",
)
SPOKEN = (" The first sentence.", " And a second one.", "שלום עולם.", *HOSTILE)


def transcript(*texts: str, start: float = 0.0) -> Transcript:
    """A segment of 2 s every 2.5 s."""
    segments: list[Segment] = [segment(text, start + 2.5 * i, words=True) for i, text in enumerate(texts)]
    duration = round((start + 2.5 * len(texts)) * SAMPLE_RATE)
    return Transcript(Recording("talk", "talk.wav"), "ok", tuple(segments), language="en", duration=duration)


@dataclass
class Stub:
    """The server's face: a test sets how it answers, and reads what it was asked."""

    url: str = ""
    transcript: Transcript = field(default_factory=lambda: transcript(*SPOKEN))
    token: str = ""  # what it asks for
    refusal: tuple[int, dict[str, Any], dict[str, str]] | None = None  # status, error, headers: instead of a stream
    refuses_unread: bool = False  # what is sent, as too large
    breaks: str = ""  # a stream ends after its first segment: with an "error" event, "cut" off, or a quiet "end";
    # "unreadable": it has none
    reads: threading.Event = field(default_factory=threading.Event)  # bodies are read
    goes_on: threading.Event = field(default_factory=threading.Event)  # streams go on after their first segment
    hung_up: threading.Event = field(default_factory=threading.Event)  # a client left before the end
    posts: list[dict[str, Any]] = field(default_factory=list)

    def app(self) -> FastAPI:
        app = FastAPI(openapi_url=None)

        @app.middleware("http")
        async def guard(request: Request, call: Callable[[Request], Any]) -> Response:
            given = request.headers.get("authorization", "")
            if self.token and request.url.path.startswith("/v1/") and given != f"Bearer {self.token}":
                return refusal(401, {"message": "no token, or not one of ours"}, {"WWW-Authenticate": "Bearer"})
            response: Response = await call(request)
            response.headers["Content-Security-Policy"] = POLICY
            response.headers["X-Content-Type-Options"] = "nosniff"
            return response

        @app.get("/")
        async def index() -> Response:
            return Response((PAGE / "index.html").read_bytes(), media_type="text/html; charset=utf-8")

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            known = {"demo": ["en", "de", "es"], "openai/whisper-base": ["en", "haw", "jw", "zh"], "tiny.en": ["en"]}
            shape = {"object": "model", "created": 0, "owned_by": "murmuration"}
            return {"object": "list", "data": [{"id": k, "languages": v, **shape} for k, v in known.items()]}

        @app.post("/v1/audio/{task}")
        async def transcribe(task: str, request: Request) -> Response:
            if self.refuses_unread:
                return refusal(413, {"message": "at most 1 MB"}, {})
            while not self.reads.is_set():
                await asyncio.sleep(0.01)
            async with request.form() as form:
                body = await form["file"].read()  # type: ignore[union-attr]
                fields = {k: form.getlist(k) for k in form if k != "file"}
                last = list(form)[-1]
            self.posts.append({"task": task, "size": len(body), "url": str(request.url), "last": last, **fields})
            if self.refusal:
                return refusal(*self.refusal)
            return StreamingResponse(self._stream(request), media_type="text/event-stream")

        app.mount("/page", StaticFiles(directory=PAGE))
        return app

    async def _stream(self, request: Request) -> AsyncIterator[str]:
        whole = verbose(self.transcript)
        usage = {"type": "duration", "seconds": 1}
        ended = False
        try:
            for number, one in enumerate(whole["segments"]):
                if self.breaks == "unreadable":
                    message = "audio: no audio in this file"
                    refused = {"message": message, "type": "invalid_request_error", "param": None, "code": "refused"}
                    yield event({"error": refused})
                    ended = True
                    return
                if number == 1:
                    while not self.goes_on.is_set():
                        yield ": ping\n\n"
                        if await request.is_disconnected():
                            return
                        await asyncio.sleep(0.01)
                    if self.breaks == "error":
                        broken = {"message": "the engine died", "type": "server_error", "param": None, "code": None}
                        yield event({"error": broken})
                    if self.breaks == "cut":
                        raise ConnectionAbortedError
                    if self.breaks:
                        ended = True
                        return
                yield event({"type": "transcript.text.delta", "delta": one["text"]})
                keys = {k: one[k] for k in ("id", "start", "end", "text")}
                yield event({"type": "transcript.text.segment", **keys})
            done = {k: v for k, v in whole.items() if k != "task"} | {"language": "english", "usage": usage}
            yield event({"type": "transcript.text.done", **done})
            ended = True
        finally:
            if not ended:
                self.hung_up.set()


def event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def refusal(status: int, error: dict[str, Any], headers: dict[str, str]) -> Response:
    body = {"error": {"message": "", "type": "invalid_request_error", "param": None, "code": None, **error}}
    return JSONResponse(body, status, headers)


@pytest.fixture
def server() -> Iterator[Stub]:
    stub = Stub()
    stub.reads.set()
    stub.goes_on.set()
    listener = socket.create_server(("127.0.0.1", 0))
    stub.url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    config = uvicorn.Config(stub.app(), ws="none", lifespan="off", log_config=None, access_log=False)
    uvicorn_server = uvicorn.Server(config)
    thread = threading.Thread(target=uvicorn_server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield stub
    stub.reads.set()
    stub.goes_on.set()
    uvicorn_server.should_exit = True
    thread.join()


expect.set_options(timeout=60_000)  # on a busy machine five seconds are nothing


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium, "these tests need Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        flags = ["--mute-audio", "--autoplay-policy=user-gesture-required"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Browser, server: Stub) -> Iterator[Page]:
    """The page as it was just opened; afterwards: it asked nobody else, broke no rule, and nothing in it failed."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(60_000)
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.extend(complaints(message)))
    page.goto(server.url)
    yield page
    context.close()
    assert wrong == []
    assert {url for url in asked if not url.startswith((server.url, f"blob:{server.url}"))} == set()
    assert not [url for url in asked if server.token and server.token in url]


def complaints(message: ConsoleMessage) -> list[str]:
    """The browser itself writes a line for each refusal and each lost connection; all else is a fault of the page."""
    told = "Failed to load resource: the server responded with a status of", "Failed to load resource: net::ERR_"
    return [message.text] if message.type in ("error", "warning") and not message.text.startswith(told) else []


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    return write_wav(tmp_path / "A talk.wav", tone(220, 20.0))


def rows(page: Page) -> Locator:
    return page.locator("#rows li")


def drop(page: Page, *files: tuple[str, bytes]) -> None:
    """A real drop onto the page, with files in its DataTransfer."""
    transfer = page.evaluate_handle(
        """files => {
            const transfer = new DataTransfer();
            for (const [name, base64] of files)
                transfer.items.add(new File([Uint8Array.from(atob(base64), c => c.charCodeAt(0))], name));
            return transfer;
        }""",
        [[name, base64.b64encode(content).decode()] for name, content in files],
    )
    for kind in ("dragenter", "dragover", "drop"):
        page.dispatch_event("#drop", kind, {"dataTransfer": transfer})
    transfer.dispose()


def tab_to(page: Page, selector: str, key: str = "Tab") -> None:
    """Presses Tab until the focus lies there, and sees that it shows."""
    for _ in range(40):
        page.keyboard.press(key)
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            shown = page.locator(selector).first if "#file" not in selector else page.locator("#drop label")
            assert shown.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
            return
    raise AssertionError(f"{selector} is not reached by Tab")


def test_the_whole_way_by_keyboard(opened: Page, server: Stub, talk: Path) -> None:
    choosers: list[FileChooser] = []
    opened.on(
        "filechooser", lambda chooser: choosers.append(chooser)
    )  # from the beginning: it takes the browser a while to give them to us
    expect(opened.get_by_label("Model")).to_be_enabled()
    tab_to(opened, "#language")
    opened.keyboard.type("Ger")
    tab_to(opened, "#task")
    opened.keyboard.type("Translate")
    tab_to(opened, "#file")
    opened.keyboard.press("Enter")
    while not choosers:
        opened.wait_for_timeout(50)
    choosers[0].set_files(talk)
    expect(rows(opened)).to_have_count(len(SPOKEN))
    expect(opened.get_by_role("heading", name="A talk.wav")).to_be_visible()
    tab_to(opened, "button[data-format=srt]")
    with opened.expect_download() as download:
        opened.keyboard.press("Enter")
    assert download.value.suggested_filename == "A talk.srt"
    tab_to(opened, "#rows li:nth-child(2) button")
    opened.keyboard.press("Enter")
    opened.wait_for_function(
        "() => { const a = document.querySelector('audio'); return !a.paused && a.currentTime > 2.5 }"
    )
    expect(rows(opened).nth(1)).to_have_attribute("aria-current", "true")
    (post,) = server.posts
    assert (post["task"], post["model"], post["language"]) == ("translations", ["demo"], ["de"])


def test_a_dropped_file_is_sent_whole(opened: Page, server: Stub, talk: Path) -> None:
    drop(opened, (talk.name, talk.read_bytes()))
    expect(opened.get_by_role("heading", name="A talk.wav")).to_be_visible()
    (post,) = server.posts
    assert post == {
        "task": "transcriptions",
        "size": talk.stat().st_size,
        "url": f"{server.url}v1/audio/transcriptions",
        "last": "file",  # so that settings can be refused before it is read
        "model": ["demo"],
        "response_format": ["verbose_json"],
        "timestamp_granularities[]": ["segment"],
        "stream": ["true"],
    }


def test_settings_are_sent(opened: Page, server: Stub, talk: Path) -> None:
    opened.get_by_label("Model").select_option("openai/whisper-base")
    language = opened.get_by_label("Language")
    assert language.locator("option").all_text_contents() == ["Detect", "Chinese", "English", "Hawaiian", "Javanese"]
    language.select_option("Chinese")
    opened.get_by_label("Task").select_option("Translate to English")
    opened.get_by_text("More settings").click()
    opened.get_by_label("Names and spellings to expect").fill(" Grünwald ")
    opened.get_by_label("Times of single words").check()
    opened.set_input_files("#file", talk)
    expect(opened.get_by_text(re.compile(r"Translated\sto\sEnglish"))).to_be_visible()
    (post,) = server.posts
    assert post["task"] == "translations"
    assert (post["model"], post["language"], post["prompt"]) == (["openai/whisper-base"], ["zh"], ["Grünwald"])
    assert post["timestamp_granularities[]"] == ["segment", "word"]


def test_a_model_of_english_alone_does_not_translate(opened: Page) -> None:
    opened.get_by_label("Task").select_option("Translate to English")
    opened.get_by_label("Model").select_option("tiny.en")
    expect(opened.get_by_label("Task")).to_have_value("transcribe")
    expect(opened.locator("#task option[value=translate]")).to_be_disabled()


def test_text_appears_while_it_is_decoded(opened: Page, server: Stub, talk: Path) -> None:
    server.goes_on.clear()
    opened.set_input_files("#file", talk)
    expect(rows(opened)).to_have_count(1)
    expect(opened.get_by_text("The first sentence.")).to_be_visible()
    expect(opened.locator("#phase")).to_have_text("Transcribing")
    expect(opened.locator("#amount")).to_have_text("0:02 of 0:20")
    expect(opened.locator("#files")).to_be_hidden()
    opened.get_by_role("button", name="The first sentence.").click()  # it can be heard already
    opened.wait_for_function("() => document.querySelector('audio').currentTime > 0.1")
    server.goes_on.set()
    expect(rows(opened)).to_have_count(len(SPOKEN))
    expect(opened.locator("#status")).to_have_text(f"Done: {len(SPOKEN)} segments")
    expect(opened.get_by_role("button", name="Download text (txt)")).to_be_visible()


def test_the_upload_shows_how_far_it_is(opened: Page, server: Stub, tmp_path: Path) -> None:
    server.reads.clear()
    long = write_wav(tmp_path / "long.wav", tone(220, 900.0))  # 29 MB: more than the sockets hold
    opened.set_input_files("#file", long)
    expect(opened.locator("#phase")).to_have_text("Uploading")
    expect(opened.locator("#amount")).to_have_text(re.compile(r"^[1-9]\S* MB of 29 MB$|^\d\.\d MB of 29 MB$"))
    part = opened.locator("#progress").evaluate("e => e.value / e.max")
    assert 0 < part < 1
    server.reads.set()
    expect(rows(opened)).to_have_count(len(SPOKEN))
    assert server.posts[0]["size"] == long.stat().st_size


def test_what_was_said_is_only_text(opened: Page, talk: Path) -> None:
    opened.set_input_files("#file", talk)
    expect(opened.get_by_text(HOSTILE[0])).to_be_visible()
    expect(opened.get_by_text(HOSTILE[1])).to_be_visible()
    expect(opened.get_by_text("a tab, a line 2 and  a separator")).to_be_visible()
    assert opened.locator("#rows").evaluate(
        "e => [...new Set([...e.querySelectorAll('*')].map(x => x.localName))]"
    ) == [
        "li",
        "button",
        "span",
    ]
    assert opened.title() == "Murmuration: speech to text"
    hebrew = opened.get_by_text("שלום עולם.")
    assert hebrew.evaluate("e => getComputedStyle(e).direction") == "rtl"


def test_a_token_is_asked_for_where_one_is_needed(opened: Page, server: Stub, talk: Path) -> None:
    expect(opened.get_by_label("This server asks for a token")).to_be_hidden()
    server.token = "s3cret-token"
    opened.set_input_files("#file", talk)
    token = opened.get_by_label("This server asks for a token")
    expect(token).to_be_focused()
    opened.keyboard.type("wrong")
    opened.keyboard.press("Enter")
    expect(opened.get_by_role("alert").get_by_text("did not take this token")).to_be_visible()
    token.fill("two words")
    opened.keyboard.press("Enter")
    expect(opened.get_by_role("alert").get_by_text("no space within")).to_be_visible()
    token.fill(f" {server.token} ")
    opened.keyboard.press("Enter")
    expect(rows(opened)).to_have_count(len(SPOKEN))  # the file that was chosen is sent without being asked for again
    expect(token).to_be_hidden()
    assert server.token not in opened.url
    assert opened.evaluate("() => [document.cookie, localStorage.length, sessionStorage.length]") == ["", 0, 1]
    opened.reload()
    expect(opened.get_by_label("Model")).to_be_enabled()
    opened.get_by_role("button", name="Forget the token").click()
    expect(token).to_be_visible()
    assert opened.evaluate("() => sessionStorage.length") == 0


def test_a_file_waits_for_the_token(opened: Page, server: Stub, talk: Path) -> None:
    server.token = "s3cret-token"
    opened.reload()
    token = opened.get_by_label("This server asks for a token")
    expect(token).to_be_focused()
    drop(opened, (talk.name, talk.read_bytes()))
    expect(opened.get_by_text("A talk.wav is sent as soon as")).to_be_visible()
    assert server.posts == []
    token.fill(server.token)
    token.press("Enter")
    expect(rows(opened)).to_have_count(len(SPOKEN))


@pytest.mark.parametrize(
    "spoken",
    [
        transcript(*SPOKEN),
        transcript("Late.", "Later.", start=360_000.0125),  # 100 hours; 12.5 ms is rounded to the even 12
        transcript(),
    ],
    ids=["hostile", "late", "silence"],
)
def test_downloads_are_the_files_of_the_package(opened: Page, server: Stub, talk: Path, spoken: Transcript) -> None:
    server.transcript = spoken
    opened.set_input_files("#file", talk)
    for name in ("txt", "srt", "vtt", "json"):
        with opened.expect_download() as download:
            opened.get_by_role("button", name=f"({name})").click()
        assert download.value.suggested_filename == f"A talk.{name}"
        text = Path(download.value.path()).read_bytes().decode()
        if name == "json":
            assert json.loads(text) == json.loads(FORMATS[name](spoken)) | {"language": "english"}
        else:
            assert text == FORMATS[name](spoken)
    opened.get_by_role("button", name="Copy text").click()
    expect(opened.get_by_text("The text was copied.")).to_be_visible()
    assert opened.evaluate("() => navigator.clipboard.readText()").replace("\r\n", "\n") == FORMATS["txt"](spoken)


def test_times_are_rounded_as_python_rounds(opened: Page) -> None:
    draw = random.Random(5)
    times = [n / 2000 for n in range(1, 200, 2)] + [draw.uniform(0, 400_000) for _ in range(2000)]
    script = "async times => { const m = await import('/page/formats.js'); return times.map(t => m.timestamp(t)) }"
    assert opened.evaluate(script, times) == [timestamp(t) for t in times]


def test_events_are_read_however_they_are_cut(opened: Page) -> None:
    stream = (
        ': ping\r\n\r\ndata: {"a":\r\ndata: 1}\r\n\r\nevent: x\nid: 3\n: ping\n\ndata:{"b":"é\\n"}\r\rdata: [DONE]\n\n'
    )
    script = """async stream => {
        const { EventReader } = await import('/page/request.js');
        return Array.from(stream, (_, i) => {
            const reader = new EventReader();
            return [stream.slice(0, i), stream.slice(i)].flatMap(part => reader.feed(part));
        });
    }"""
    assert opened.evaluate(script, stream) == [[{"a": 1}, {"b": "é\n"}]] * len(stream)


def test_cancel_lets_go_of_the_server(opened: Page, server: Stub, talk: Path) -> None:
    server.goes_on.clear()
    opened.set_input_files("#file", talk)
    expect(rows(opened)).to_have_count(1)
    opened.get_by_role("button", name="Cancel").click()
    deadline = time.monotonic() + 60
    while not server.hung_up.wait(0.1):  # a stream that was cut while it waited to send ends when it is collected
        gc.collect()
        assert time.monotonic() < deadline
    expect(opened.get_by_text("A talk.wav was cancelled.")).to_be_visible()
    expect(opened.get_by_text("Incomplete: the text ends at 0:02")).to_be_visible()
    with opened.expect_download() as download:
        opened.get_by_role("button", name="(txt)").click()
    assert download.value.suggested_filename == "A talk (incomplete).txt"
    expect(opened.get_by_role("button", name="(json)")).to_be_disabled()
    server.goes_on.set()
    opened.get_by_role("button", name="Transcribe again").click()
    expect(rows(opened)).to_have_count(len(SPOKEN))
    expect(opened.get_by_text("was cancelled")).to_have_count(0)
    expect(opened.get_by_role("button", name="(json)")).to_be_enabled()


def test_a_segment_is_played_from_its_start_to_its_end(opened: Page, talk: Path) -> None:
    opened.set_input_files("#file", talk)
    expect(rows(opened)).to_have_count(len(SPOKEN))
    opened.evaluate(
        """() => {
            const audio = document.querySelector("audio");
            window.told = [];
            for (const kind of ["seeked", "play", "pause"])
                audio.addEventListener(kind, () => window.told.push([kind, audio.currentTime]));
        }"""
    )
    rows(opened).nth(1).locator("span").click()  # [2.5, 4.5)
    expect(rows(opened).nth(1)).to_have_attribute("aria-current", "true")
    opened.wait_for_function("() => window.told.some(([kind]) => kind === 'pause')")
    told = dict(opened.evaluate("() => window.told"))
    assert told["seeked"] == pytest.approx(2.5, abs=0.2)  # it plays on while the event comes
    assert 4.5 <= told["pause"] < 5.5
    expect(rows(opened).nth(1)).to_have_attribute("aria-current", "true")
    rows(opened).nth(2).locator("button").click()
    expect(rows(opened).nth(2)).to_have_attribute("aria-current", "true")
    expect(opened.locator("#rows [aria-current]")).to_have_count(1)
    rows(opened).nth(2).locator("button").click()  # the same once more: stops
    opened.wait_for_function("() => document.querySelector('audio').paused")


def test_what_the_browser_cannot_play_is_transcribed_all_the_same(opened: Page, server: Stub, tmp_path: Path) -> None:
    odd = tmp_path / "odd.w64"
    odd.write_bytes(b"riff\x2e\x91\xcf\x11" * 100)
    opened.set_input_files("#file", odd)
    expect(rows(opened)).to_have_count(len(SPOKEN))
    expect(opened.get_by_text("This browser cannot play this file")).to_be_visible()
    expect(opened.locator("audio")).to_be_hidden()
    rows(opened).first.click()
    expect(opened.get_by_text("This browser cannot play this file")).to_be_visible()


REFUSALS: list[tuple[int, dict[str, Any], dict[str, str], tuple[str, ...]]] = [
    (413, {"message": "at most 100 MB"}, {}, ("too large", "Cut it into parts", "The server says: at most 100 MB")),
    (503, {"message": "the queue is full"}, {"Retry-After": "7"}, ("busy", "Try again in 7 s", "queue is full")),
    (429, {}, {"Retry-After": "600"}, ("busy", "Try again in 10 minutes")),
    (503, {}, {"Retry-After": "soon"}, ("busy", "Try again in a moment")),
    (400, {"message": "no audio"}, {}, ("cannot read this file", "convert it to WAV", "no audio")),
    (400, {"message": "language", "param": "language"}, {}, ("does not take these settings", "Change them above")),
    (404, {}, {}, ("does not have this model", "Choose another one")),
    (504, {}, {}, ("ran out of time", "cut the recording")),
    (500, {"message": "<b>x</b>"}, {}, ("failed on this recording", "<b>x</b>")),
]


def test_a_refusal_says_what_to_do(opened: Page, server: Stub, talk: Path) -> None:
    problem = opened.get_by_role("alert").filter(has=opened.get_by_role("button", name="Try again"))
    for number, (status, error, headers, said) in enumerate(REFUSALS):
        server.refusal = (status, error, headers)
        if number == 0:
            opened.set_input_files("#file", talk)
        else:
            problem.get_by_role("button", name="Try again").click()
        for part in (talk.name, *said):
            expect(problem).to_contain_text(part)
        expect(opened.locator("#transcript")).to_be_hidden()
        assert len(server.posts) == number + 1
    server.refusal = None
    problem.get_by_role("button", name="Try again").click()
    expect(rows(opened)).to_have_count(len(SPOKEN))
    expect(opened.locator("#problem")).to_be_hidden()


def test_a_refusal_in_the_middle_of_the_upload(opened: Page, server: Stub, tmp_path: Path) -> None:
    server.refuses_unread = True
    opened.set_input_files("#file", write_wav(tmp_path / "long.wav", tone(220, 900.0)))
    expect(opened.locator("#problem")).to_contain_text(re.compile("too large for this server|takes no file this large"))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("error", "The server stopped before the end. What came before is below."),
        ("cut", "The connection to the server was lost."),
        ("end", "The connection to the server was lost."),
    ],
)
def test_a_stream_that_breaks_leaves_what_came(opened: Page, server: Stub, talk: Path, how: str, said: str) -> None:
    server.breaks = how
    opened.set_input_files("#file", talk)
    for sentence in said.split(". "):
        expect(opened.locator("#problem")).to_contain_text(sentence)
    if how == "error":
        expect(opened.locator("#problem")).to_contain_text("The server says: the engine died")
    expect(rows(opened)).to_have_count(1)
    expect(opened.get_by_text("Incomplete: the text ends at 0:02")).to_be_visible()


def test_a_file_that_turns_out_to_be_no_audio(opened: Page, server: Stub, talk: Path) -> None:
    server.breaks = "unreadable"
    opened.set_input_files("#file", talk)
    expect(opened.locator("#problem")).to_contain_text("The server cannot read this file as audio.")
    expect(opened.locator("#problem")).to_contain_text("The server says: audio: no audio in this file")


def test_a_file_that_has_gone_is_named(opened: Page, server: Stub, talk: Path) -> None:
    server.refusal = (503, {}, {})
    opened.set_input_files("#file", talk)
    expect(opened.locator("#problem")).to_contain_text("busy")
    talk.unlink()
    opened.get_by_role("button", name="Try again").click()
    expect(opened.locator("#problem")).to_contain_text("The file can no longer be read.")


def test_a_server_that_is_not_there_is_asked_again(opened: Page, server: Stub) -> None:
    opened.route("**/v1/models", lambda route: route.abort())
    opened.reload()
    expect(opened.locator("#problem")).to_contain_text("The server does not answer.")
    opened.unroute("**/v1/models")
    opened.get_by_role("button", name="Try again").click()
    expect(opened.get_by_label("Model")).to_be_enabled()
    expect(opened.locator("#problem")).to_be_hidden()


def test_a_second_file_follows_the_first(opened: Page, server: Stub, talk: Path) -> None:
    drop(opened, ("one.wav", talk.read_bytes()))
    expect(rows(opened)).to_have_count(len(SPOKEN))
    server.transcript = transcript("Another talk.")
    server.goes_on.clear()
    drop(opened, ("two.wav", talk.read_bytes()), ("three.wav", b"x"))
    expect(opened.get_by_text("One recording at a time: two.wav was taken")).to_be_visible()
    expect(rows(opened)).to_have_text(["0:00Another talk."])
    expect(opened.get_by_role("heading", name="two.wav")).to_be_visible()


def test_a_file_that_comes_too_early_ends_nothing(opened: Page, server: Stub, talk: Path) -> None:
    server.goes_on.clear()
    opened.set_input_files("#file", talk)
    expect(rows(opened)).to_have_count(1)
    drop(opened, ("two.wav", b"x"))
    expect(opened.get_by_text("A talk.wav is still being worked on.")).to_be_visible()
    server.goes_on.set()
    expect(rows(opened)).to_have_count(len(SPOKEN))
    assert len(server.posts) == 1


def test_what_holds_nothing_is_not_sent(opened: Page, server: Stub) -> None:
    drop(opened, ("nothing.wav", b""))
    expect(opened.locator("#problem")).to_contain_text("nothing.wav is empty.")
    drop(opened)
    expect(opened.locator("#note")).to_have_text("There was no file in what you dropped.")
    assert server.posts == []


def test_silence_is_said(opened: Page, server: Stub, talk: Path) -> None:
    server.transcript = transcript()
    opened.set_input_files("#file", talk)
    expect(opened.get_by_text("No speech was found in this recording.")).to_be_visible()


@pytest.mark.parametrize("width", [320, 1280])
def test_nothing_is_wider_than_the_window(opened: Page, server: Stub, talk: Path, width: int) -> None:
    server.transcript = transcript(*SPOKEN, "a" * 300, start=36_000)
    opened.set_viewport_size({"width": width, "height": 640})
    opened.get_by_text("More settings").click()
    fits = "() => document.documentElement.scrollWidth <= innerWidth"
    assert opened.evaluate(fits)
    opened.set_input_files("#file", {"name": "b" * 200 + ".wav", "mimeType": "audio/wav", "buffer": talk.read_bytes()})
    expect(rows(opened)).to_have_count(len(SPOKEN) + 1)
    expect(opened.locator("audio")).to_be_visible()
    assert opened.evaluate(fits)


def test_the_files_hold_nothing_that_the_policy_refuses() -> None:
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
    for file in PAGE.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|document\.write|\beval\(|@import|url\(", text), (
            file
        )
    sources = re.findall(r'\b(?:src|href)="([^"]+)"', html)
    assert sources
    assert [s for s in sources if s != "docs" and not (PAGE.parent / s).is_file()] == []


def test_on_the_server_itself(browser: Browser, serve: Serve) -> None:
    """The real application with its token: asked for, sent, and the text of a file that really was decoded."""
    server = serve(tokens=Tokens(("geheim",)))
    context = browser.new_context()
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.extend(complaints(message)))
    page.goto(server.url)
    page.locator("#token-value").fill("geheim")
    page.locator("#token-value").press("Enter")
    drop(page, ("en-five.mp3", clip("en-five.mp3").read_bytes()))
    said = requests.post(
        f"{server.url}/v1/inference/{MODEL}", files={"audio": clip("en-five.mp3").read_bytes()},
        headers={"Authorization": "Bearer geheim"}, timeout=60,
    ).json()  # fmt: skip
    expect(rows(page)).to_have_count(len(said["segments"]))
    for row, one in zip(rows(page).all(), said["segments"], strict=True):
        assert one["text"] in row.inner_text()
    page.close()
    context.close()
    assert wrong == []


def test_without_the_page(serve: Serve) -> None:
    url = serve(ui=False).url
    assert requests.get(url, timeout=30).status_code == 404
    assert requests.get(f"{url}/page/app.js", timeout=30).status_code == 404
    with_it = serve().url
    assert requests.get(f"{with_it}/page/app.js", timeout=30).headers["content-type"].startswith("text/javascript")
    assert requests.get(f"{with_it}/page/..%2Fapp.py", timeout=30).status_code == 404
