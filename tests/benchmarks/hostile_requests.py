"""Requests that no honest client sends, drawn by number: the same number is the same request on every run.

What `http_hostile.py` sends. Each is the bytes of a whole connection. Knows the routes, and no server.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.audio_files import PLAYLISTS
from tests.benchmarks.mutated_audio import mutant, originals

Draw = np.random.Generator
NATIVE, OPENAI = "/v1/inference/demo", "/v1/audio/transcriptions"
FIELDS = ("task", "initial_prompt", "temperature", "language", "chunk_level", "chunk_length_s", "webhook", "model",
          "prompt", "response_format", "stream", "timestamp_granularities[]", "chunking_strategy", "include[]",
          "audio", "file", "", "a" * 5000, "é", "x\x00y", " x ")  # fmt: skip
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "CONNECT", "get", "FOO", "M" * 3000)
NUMBERS = ("9" * 6000, "1e9999", "-1e9999", "NaN", "Infinity", "1.0", "1E400", "-0", "0" * 100)
CHARSETS = ("utf-8", "utf-16", "idna", "unicode_escape", "hex", "rot13", "nonsense", "utf-7", "\xff")


@dataclass(frozen=True, slots=True)
class Request:
    """The bytes of a connection, and what is known of them."""

    kind: str
    number: int
    data: bytes
    is_http: bool = True  # one request that must be answered; else an end of the connection is as good
    has_body: bool = True  # the answer: none has where HEAD is asked
    speaks: bool = True  # it may be answered with a transcript


@dataclass(frozen=True, slots=True)
class Bait:
    """What must be neither read nor dialled."""

    file: Path
    port: int

    def urls(self) -> list[str]:
        local = f"127.0.0.1:{self.port}"
        return [f"http://{local}/a.wav", f"https://{local}/", f"http://localhost:{self.port}/", f"tcp://{local}",
                f"http://[::ffff:127.0.0.1]:{self.port}/", f"http://2130706433:{self.port}/", f"rtmp://{local}/a",
                f"file://{self.file}", str(self.file), f"concat:{self.file}|{self.file}", f"file:{self.file}",
                f"subfile,,start,0,end,0,,:{self.file}", f"crypto+file:{self.file}", f"pipe:0|{self.file}",
                f"http://127.1:{self.port}/", f"gopher://{local}/_x", f"data:audio/wav;base64,{self.file}"]  # fmt: skip


def pick(draw: Draw, of: Any) -> Any:
    return of[int(draw.integers(len(of)))]


def http(path: str, body: bytes, kind: str | bytes, *more: str, method: str = "POST") -> bytes:
    kind = kind.encode("latin-1", "replace") if isinstance(kind, str) else kind
    head = "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", *more]).encode("latin-1")
    return head + b"\r\nContent-Type: " + kind + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def part(name: bytes, value: bytes, more: bytes = b"", boundary: bytes = b"b") -> bytes:
    return b'--%s\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % (boundary, name, more, value)


def nasty(draw: Draw, bait: Bait) -> str:
    """A value that somewhere is read as something else."""
    return str(
        pick(
            draw,
            [
                "",
                '"',
                '""',
                '"\\ud800"',
                "\x00",
                "\ud800",
                "é" * 40,
                "\U0001f600",
                "nan",
                "-nan",
                "inf",
                "1e999",
                "-0",
                "9" * 5000,
                "1" * 30,
                "0x10",
                "１",
                "1_0",
                "{}",
                "[]",
                "null",
                "true",
                "<script>alert(1)</script>",
                "../../../../etc/passwd",
                "%00",
                "%2e%2e%2f",
                "\r\nX-Bad: 1",
                "\n\n",
                "a" * 30_000,
                "${jndi:ldap://127.0.0.1}",
                "{{7*7}}",
                "';--",
                "\u202e",
                *bait.urls(),
            ],
        )
    )


# ---- forms


def multipart(draw: Draw, audio: bytes, bait: Bait) -> Request:
    path, name = pick(draw, [(NATIVE, b"audio"), (OPENAI, b"file")])
    kind: Any = "multipart/form-data; boundary=b"
    fields = [
        part(pick(draw, FIELDS).encode(), nasty(draw, bait).encode("utf-8", "surrogatepass")[:2000])
        for _ in range(int(draw.integers(0, 3)))
    ]
    parts = [*fields, part(name, audio, b'; filename="a"')]
    end = b"--b--\r\n"
    body = b"".join(parts) + end
    which = int(draw.integers(24))
    if which == 0:
        kind = (
            f"multipart/form-data; boundary={pick(draw, ['', 'c', 'b' * 300, '--', chr(34), 'b; boundary=c', ' b '])}"
        )
    elif which == 1:
        body = body[: int(draw.integers(len(body)))]
    elif which == 2:
        inner = body.replace(b"--b", b"--c")
        body = part(name, inner, b'; filename="a"\r\nContent-Type: multipart/mixed; boundary=c') + end
    elif which == 3:
        body = part(name, audio, b'; filename="%s"' % (b"a" * int(draw.integers(1, 200_000)))) + end
    elif which == 4:
        body = part(name, audio, b'; filename="a"' + b"\r\nX: y" * int(draw.integers(1, 3000))) + end
    elif which == 5:
        body = part(b"x", b"", b"") * int(draw.integers(60, 5000)) + body
    elif which == 6:
        body = part(b"x", b"", b'; filename="x"') * int(draw.integers(1, 3000)) + body
    elif which == 7:
        body = part(bytes(draw.bytes(20)), bytes(draw.bytes(50))) + body
    elif which == 8:
        kind = f"multipart/form-data; boundary=b; charset={pick(draw, CHARSETS)}"
    elif which == 9:
        body = b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n" + body
    elif which == 10:
        body = b"--b\r\n\r\nx\r\n" + body
    elif which == 11:
        body = body.replace(b"\r\n", b"\n")
    elif which == 12:
        body = bytes(draw.bytes(100_000)) + b"\r\n" + body
    elif which == 13:
        body = body + bytes(draw.bytes(100_000))
    elif which == 14:
        body = b"".join(parts)
    elif which == 15:
        body = part(name, audio) + end
    elif which == 16:
        body = part(name, audio, b'; filename="a"') * int(draw.integers(2, 6)) + end
    elif which == 17:
        body = part(name, b"data:;base64," + base64.b64encode(audio)) + end
    elif which == 18:
        body = _flipped(body, draw)
    elif which == 19:
        body = part(name, base64.b64encode(audio), b'; filename="a"\r\nContent-Transfer-Encoding: base64') + end
    elif which == 20:
        names = [
            b"../../../../tmp/x",
            b"a\x00b",
            b"\xff\xfe",
            b'a"; name="x',
            b"C:\\a",
            b".",
            b"",
            str(bait.file).encode(),
        ]
        body = part(name, audio, b'; filename="%s"' % pick(draw, names)) + end
    elif which == 21:
        body = part(name, audio, b"; filename*=utf-8''%e2%82%ac%00; filename*0=a; filename=b") + end
    elif which == 22:
        body = part(b"x", b"y" * int(draw.integers(1, 1_500_000))) + body
    else:
        body = (
            b"--b\r\nContent-Disposition: form-data; name=audio; name=file; filename=a; filename=b\r\n"
            b'Content-Disposition: attachment; name="x"\r\n\r\n' + audio + b"\r\n" + end
        )
    return Request("multipart", which, http(path, body, kind))


def field(draw: Draw, audio: bytes, bait: Bait) -> Request:
    """A form that is well made, of values that are not."""
    path, name = pick(draw, [(NATIVE, b"audio"), (OPENAI, b"file"), ("/v1/openai/audio/translations", b"file")])
    chosen = [(pick(draw, FIELDS), nasty(draw, bait)) for _ in range(int(draw.integers(1, 5)))]
    body = b"".join(part(one.encode(), value.encode("utf-8", "surrogatepass")) for one, value in chosen)
    query = "?" + "&".join(["a", "", "%20=1", "%ff=%00", "a=1"][: int(draw.integers(5))])
    return Request(
        "field",
        0,
        http(
            path + query, body + part(name, audio, b'; filename="a"') + b"--b--\r\n", "multipart/form-data; boundary=b"
        ),
    )


def _flipped(data: bytes, draw: Draw) -> bytes:
    bad = np.frombuffer(data, np.uint8).copy()
    where = draw.integers(0, min(600, len(bad)), size=int(draw.integers(1, 20)))
    bad[where] = draw.integers(0, 256, len(where))
    return bad.tobytes()


# ---- JSON


def json_body(draw: Draw, audio: bytes, bait: Bait) -> Request:
    url = "data:audio/wav;base64," + base64.b64encode(audio).decode()
    wrong = pick(
        draw, [None, True, False, [], {}, [[]], {"a": 1}, 1e308, -1, 10**30, "", [url], {"url": url}, nasty(draw, bait)]
    )
    name = pick(draw, FIELDS)
    which = int(draw.integers(16))
    bodies: list[Callable[[], str | bytes]] = [
        lambda: json.dumps({"audio": url, name: wrong}),
        lambda: json.dumps({"audio": wrong}),
        lambda: "[" * int(draw.integers(1, 200_000)),
        lambda: '{"a":' * int(draw.integers(1, 200_000)) + "1" + "}" * int(draw.integers(1, 200_000)),
        lambda: "{" + f'"audio":"{url}",' * int(draw.integers(2, 5)) + '"task":"translate","task":"x"}',
        lambda: f'{{"audio":"{url}",{json.dumps(name)}:{pick(draw, NUMBERS)}}}',
        lambda: f'{{"audio":"{url}","{pick(draw, FIELDS[:4])}":"\\ud800{nasty(draw, bait)!a}"}}',
        lambda: "\ufeff" + json.dumps({"audio": url}),
        lambda: json.dumps({"audio": url}).encode(pick(draw, ["utf-16", "utf-32", "utf-16-be"])),
        lambda: b'{"audio": "' + bytes(draw.bytes(2000)) + b'"}',
        lambda: json.dumps({"audio": url}) + pick(draw, ["x", "{}", "\x00", ",", " " * 100_000]),
        lambda: pick(draw, ["", "null", "1", '"x"', "[]", "true", "{", "}", "{]", "/* */{}", "{'audio':1}", "\x00"]),
        lambda: "{" + ",".join(f'"k{n}":1' for n in range(int(draw.integers(1, 50_000)))) + "}",
        lambda: '{"a":[' + pick(draw, ["{},", "[],", "1.5,", '"ab",']) * int(draw.integers(1, 300_000)) + "1]}",
        lambda: json.dumps({"k" * int(draw.integers(1, 500_000)): 1, "audio": url}),
        lambda: json.dumps({"audio": url})[: int(draw.integers(len(url)))],
    ]
    body = bodies[which]()
    body = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
    kind = pick(draw, ["application/json", "application/json", "application/json; charset=utf-16", "APPLICATION/JSON;"])
    return Request("json", which, http(pick(draw, [NATIVE, NATIVE, NATIVE, OPENAI]), body, kind))


def data_url(draw: Draw, audio: bytes, bait: Bait) -> Request:
    code = base64.b64encode(audio).decode()
    url = pick(
        draw,
        [
            "data:",
            "data:,",
            "data:;base64",
            "data:;base64,",
            "data:;base64,====",
            "data:;base64," + code[:-1],
            "data:audio/wav," + code,
            "data:;base64;x," + code,
            "data:;BASE64," + code,
            "DATA:;base64," + code,
            "data:;base64,%%%",
            "data:;base64," + code + "\n",
            "data:;base64," + code.replace("A", "-"),
            "data:;base64,\ud800",
            "data:" + "x" * 100_000 + ";base64," + code,
            "data:;base64,data:;base64," + code,
            " data:;base64," + code,
            *bait.urls(),
        ],
    )
    if draw.integers(2):
        return Request("data_url", 0, http(NATIVE, json.dumps({"audio": url}).encode(), "application/json"))
    body = part(b"audio", url.encode("utf-8", "surrogatepass"), b'; filename="a"') + b"--b--\r\n"
    return Request("data_url", 1, http(NATIVE, body, "multipart/form-data; boundary=b"))


# ---- audio


class Sounds:
    """Mutated files, made from the originals of `mutated_audio.py`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.originals = originals(folder)

    def mutated(self, number: int, draw: Draw) -> Request:
        kind, form, path = mutant(number, self.originals, self._folder)
        data = path.read_bytes()
        path.unlink()
        name = pick(draw, ["a", path.name, "a.m3u8", "a.sdp", "a.wav", "a.concat"])
        body = part(b"audio", data, f'; filename="{name}"'.encode()) + b"--b--\r\n"
        is_list = kind == "playlist"
        return Request(
            f"audio {kind}",
            sorted(self.originals).index(form),
            http(NATIVE, body, "multipart/form-data; boundary=b"),
            speaks=not is_list,
        )

    def luring(self, draw: Draw, bait: Bait) -> Request:
        """A file that names another one, or an address."""
        url = pick(draw, bait.urls())
        which = int(draw.integers(8))
        texts = [PLAYLISTS[name].format(path=url) for name in sorted(PLAYLISTS)]
        texts += [f"[playlist]\nFile1={url}\n", f"v=0\r\nc=IN IP4 127.0.0.1\r\nm=audio {bait.port} RTP/AVP 0\r\n"]
        data = texts[which].encode()
        if draw.integers(4) == 0:  # a track that lies in another file, as QuickTime has it
            reference = url.encode() + b"\x00"
            data = self.originals["m4a"].replace(b"url \x00\x00\x00\x01", b"url \x00\x00\x00\x00" + reference)
        elif draw.integers(3) == 0:
            data = self.originals["mono16k"][:44] + data
            return Request("lure", 8, _upload(data))
        return Request("lure", which, _upload(data), speaks=False)


def _upload(data: bytes) -> bytes:
    return http(NATIVE, part(b"audio", data, b'; filename="a"') + b"--b--\r\n", "multipart/form-data; boundary=b")


# ---- HTTP


def bare(draw: Draw, audio: bytes, bait: Bait) -> Request:
    """What is nearly HTTP, or is it in a way that two readers understand differently."""
    form = part(b"audio", audio, b'; filename="a"') + b"--b--\r\n"
    head = b"POST " + NATIVE.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    get, length = b"GET /healthz HTTP/1.1\r\nHost: x\r\n", b"Content-Length: %d\r\n" % len(form)
    chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(form), form)
    te = b"Transfer-Encoding: chunked\r\n"
    shapes = [
        head + length + te + b"\r\n" + chunk,
        head + te + length + b"\r\n" + form,
        head + length + length + b"\r\n" + form,
        head + length + b"Content-Length: 1\r\n\r\n" + form,
        head + b"Content-Length: +5\r\n\r\n" + form,
        head + b"Content-Length: -1\r\n\r\n" + form,
        head + b"Content-Length: 0x10\r\n\r\n" + form,
        head + b"Content-Length: 5, 5\r\n\r\n" + form,
        head + b"Content-Length: " + b"9" * 400 + b"\r\n\r\n",
        head + b"Content-Length : 5\r\n\r\n" + form,
        head + b"Transfer-Encoding : chunked\r\n\r\n" + chunk,
        head + b"Transfer-Encoding: chunked, chunked\r\n\r\n" + chunk,
        head + b"Transfer-Encoding: xchunked\r\n\r\n" + chunk,
        head + b"Transfer-Encoding: identity\r\n\r\n" + form,
        head + te + te + b"\r\n" + chunk,
        head + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + chunk,
        head + b"Transfer-Encoding:\x0bchunked\r\n\r\n" + chunk,
        head + te + b"\r\n" + b"5;x=y\r\nabcde\r\n0\r\n\r\n",
        head + te + b"\r\n" + b"5;" + b"x" * 30_000 + b"\r\nabcde\r\n0\r\n\r\n",
        head + te + b"\r\n" + b"-5\r\nabcde\r\n",
        head + te + b"\r\n" + b"FFFFFFFFFFFFFFFFF\r\nabc",
        head + te + b"\r\n" + b"5\nabcde\n0\n\n",
        head + te + b"\r\n" + b"5\r\nabcdeXX0\r\n\r\n",
        head + te + b"\r\n" + chunk[:-5] + b"0\r\nX: y\r\nContent-Length: 5\r\n\r\n",
        head + te + b"\r\n" + b"0\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
        head + te + b"Connection: close\r\n\r\n" + b"1\r\n-\r\n" * 9000 + b"0\r\n\r\n",
        get + b"\r\n" + get + b"\r\n" + get + b"Connection: close\r\n\r\n",
        head + length + b"\r\n" + form + get + b"Connection: close\r\n\r\n",
        head + length + b"Connection: close\r\n\r\n" + form + get + b"\r\n",
        (get + b"\r\n") * 300 + get + b"Connection: close\r\n\r\n",
        get + b"Content-Length: 5\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n",
        get + te + b"\r\n0\r\n\r\n" + get + b"Connection: close\r\n\r\n",
        b"GET http://127.0.0.1:%d/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % bait.port,
        b"GET http://evil@x/healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: x\r\n\r\n" % bait.port,
        b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET /healthz\r\n",
        b"GET /healthz\r\n\r\n",
        b"GET /healthz HTTP/0.9\r\n\r\n",
        b"GET /healthz HTTP/2.0\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.0\r\n\r\n",
        b"GET  /healthz  HTTP/1.1\r\nHost: x\r\n\r\n",
        get + b"Host: y\r\nConnection: close\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: a b\r\nConnection: close\r\n\r\n",
        get + b"X: " + b"a" * 60_000 + b"\r\n\r\n",
        get + b"X: y\r\n" * 5000 + b"\r\n",
        get + b" folded\r\n\r\n",
        get + b"X\x00: y\r\n\r\n",
        get + b"X: a\rb\r\n\r\n",
        get + b"X: a\x00b\r\n\r\n",
        get + b": y\r\n\r\n",
        get + b"noseparator\r\n\r\n",
        get + b"\xff: y\r\n\r\n",
        b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\r\n\r\n\r\n" + get + b"Connection: close\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        bytes(range(256)),
        b"\x00" * 5000,
        b"\n" * 70_000,
        get + b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n\r\n",
        get + b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
        head + length + b"Expect: 100-continue\r\nConnection: close\r\n\r\n" + form,
        head + length + b"Expect: 200-nonsense\r\nConnection: close\r\n\r\n" + form,
        head + length + b"Content-Encoding: gzip\r\nConnection: close\r\n\r\n" + form,
        head + length + b"Authorization: Bearer \xff\xfe\r\nConnection: close\r\n\r\n" + form,
        head + length + b"X-Forwarded-For: 127.0.0.1\r\nX-Original-URL: /metrics\r\nConnection: close\r\n\r\n" + form,
        head + length + b"Range: bytes=0-1\r\nIf-None-Match: *\r\nConnection: close\r\n\r\n" + form,
    ]
    which = int(draw.integers(len(shapes)))
    data = shapes[which]
    if draw.integers(3) == 0:
        data = _flipped(data, draw)
    return Request("bare", which, data, is_http=False)


def path(draw: Draw, audio: bytes, bait: Bait) -> Request:
    method = pick(draw, METHODS)
    target = pick(
        draw,
        [
            "/page/../app.py",
            "/page/..%2fapp.py",
            "/page/%2e%2e/%2e%2e/etc/passwd",
            "/page//etc/passwd",
            "/page/%00",
            "/page/.",
            "/page/..",
            "/page/",
            "/page/index.html%00.js",
            "/page/..\\app.py",
            "/page/%252e%252e%252fapp.py",
            "/page/" + "a" * 9000,
            "//page/index.html",
            "/docs/",
            "/docs/../readyz",
            "/docs/%2e%2e/v1/webhooks",
            "/openapi.json/",
            "/metrics/x",
            "/healthz/",
            "/%2fhealthz",
            "/healthz%00",
            "/v1/inference/",
            "/v1/inference",
            "/v1/inference/" + "m" * 20_000,
            "/v1/inference/..%2f..%2fetc%2fpasswd",
            "/v1/inference/%F0%9F%98%80",
            "/v1/inference/%ff%fe",
            "/v1/inference/demo/",
            "/v1/inference/demo%00",
            "/v1/inference//demo",
            "/v1/inference/%3Cscript%3E",
            "/v1/inference/demo%0d%0aX:y",
            NATIVE,
            OPENAI,
            "/v1/models",
            "/v1/models/demo",
            "/models/list",
            "/v1/webhooks",
            "/v1/webhooks/../models",
            "/",
            "/?" + "a=1&" * 2000,
            "/.git/config",
            "/.env",
            f"/page{bait.file}",
            "/static/x",
            "/v1/audio",
            "/healthz?x=%00%ff",
            "/readyz",
            "/metrics",
            "/openapi.json",
            "/docs",
            "/%",
            "/%zz",
            "/;a=b",
            "/healthz#x",
            "/v1/openai/audio/transcriptions/",
            "/V1/INFERENCE/demo",
        ],
    )
    body = b"" if draw.integers(2) else part(b"audio", audio, b'; filename="a"') + b"--b--\r\n"
    return Request(
        "path",
        0,
        http(target, body, "multipart/form-data; boundary=b", method=method),
        has_body=method not in ("HEAD", "CONNECT"),
        is_http=method != "CONNECT",
    )


KINDS: dict[str, Callable[[Draw, bytes, Bait], Request]] = {
    "multipart": multipart,
    "field": field,
    "json": json_body,
    "data_url": data_url,
    "bare": bare,
    "path": path,
}
