"""Webhooks, delivered: to real receivers, signed, to allowed addresses only. Only the clock is ours."""

from __future__ import annotations

import asyncio
import datetime
import json
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from standardwebhooks import Webhook
from webhooks import (
    AUDIO,
    ORDER,
    Bench,
    Clock,
    Door,
    Receiver,
    always,
    ended,
    forever,
    in_loop,
    names,
    one,
    transcribed,
    until,
)

from pipeline.errors import ConfigError
from serve_app import webhook
from serve_app.webhook import SpoolFullError, WebhookRefusedError, seconds_of, signing_key

# --- delivery ---------------------------------------------------------------------------------------------------------


@in_loop
async def test_an_answer_is_delivered_once_and_nothing_of_it_stays(bench: Bench) -> None:
    async with Receiver() as there, bench.running(bench.settings(there.origin)) as hooks:
        url = f"{there.origin}/hook?key=a%2Fb"
        await hooks.check(url)
        audio = bench.audio()
        await hooks.accept("request-1", url, ORDER, audio)
        assert not audio.exists()
        await until(ended(hooks))
        assert hooks.counts() == {"pending": 0, "undelivered": 0, "delivered": 1, "dead": 0, "attempts": 1}
    (post,) = there.posts
    assert post.path == "/hook?key=a%2Fb"
    assert json.loads(post.body) == {"request_id": "request-1", "order": ORDER, "bytes": len(AUDIO)}
    assert bench.left() == []


@in_loop
async def test_what_is_sent_holds_neither_credentials_nor_audio(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """No token, no cookie that the receiver set before, no proxy from the environment."""
    async with Receiver() as proxy, Receiver(always(500, Set_Cookie="a=b")) as there:
        monkeypatch.setenv("http_proxy", proxy.origin)
        monkeypatch.setenv("HTTP_PROXY", proxy.origin)
        async with bench.running(bench.settings(there.origin, max_attempts=2)) as hooks:
            await one(bench, hooks, f"{there.origin}/")
    assert proxy.posts == []
    assert len(there.posts) == 2
    for post in there.posts:
        assert set(post.headers) == {
            "host", "accept", "connection", "content-type", "content-length", "user-agent", "webhook-id",
            "webhook-timestamp",
        }  # fmt: skip
        assert post.headers["content-type"] == "application/json"
        assert AUDIO not in post.body


@pytest.mark.parametrize("secret", ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_c2VjcmV0", "a text"])
@in_loop
async def test_the_official_library_verifies_every_attempt(bench: Bench, secret: str) -> None:
    clock = Clock()

    async def answer(request: web.Request, before: int) -> web.Response:
        return web.Response(status=200 if before else 503)

    settings = lambda origin: bench.settings(origin, secret=secret)  # noqa: E731
    async with Receiver(answer) as there, bench.running(settings(there.origin), clock=clock) as hooks:
        await one(bench, hooks, f"{there.origin}/")
    first, second = there.posts
    verifier = Webhook(secret if secret.startswith("whsec_") else secret.encode())
    for post in (first, second):
        assert verifier.verify(post.body, post.headers)["request_id"] == "request-1"
    assert (first.id, first.body) == (second.id, second.body)
    assert int(second.headers["webhook-timestamp"]) - int(first.headers["webhook-timestamp"]) >= 5
    assert secret not in repr(settings(there.origin))


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_%%%", "whsec_a"])
def test_a_secret_that_holds_no_key_is_refused(secret: str) -> None:
    with pytest.raises(ConfigError, match="secret"):
        signing_key(secret)


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
@in_loop
async def test_any_2xx_ends_it(bench: Bench, status: int) -> None:
    async with Receiver(always(status)) as there, bench.running(bench.settings(there.origin)) as hooks:
        await one(bench, hooks, f"{there.origin}/")
        assert hooks.counts()["delivered"] == 1
    assert len(there.posts) == 1


@in_loop
async def test_410_wants_no_further_attempt(bench: Bench) -> None:
    clock = Clock()
    async with Receiver(always(410)) as there, bench.running(bench.settings(there.origin), clock=clock) as hooks:
        await one(bench, hooks, f"{there.origin}/secret-path?secret=query")
        (letter,) = hooks.dead_letters()
    assert len(there.posts) == 1
    assert letter == {
        "request_id": "request-1",
        "host": "127.0.0.1",
        "reason": "gone",
        "attempts": 1,
        "when": clock.now,
    }
    assert bench.left() == ["dead/request-1.json"]
    assert "secret" not in (bench.spool / "dead" / "request-1.json").read_text()


@pytest.mark.parametrize("status", [301, 302, 307, 400, 401, 404, 429, 500, 503])
@in_loop
async def test_anything_else_is_tried_again_with_growing_gaps_up_to_the_cap(bench: Bench, status: int) -> None:
    """401 is what our own inference route says to a webhook: no loop, since no token is sent."""
    clock = Clock()
    async with Receiver(always(status)) as there, bench.running(bench.settings(there.origin), clock=clock) as hooks:
        await one(bench, hooks, f"{there.origin}/v1/inference/openai/whisper-base")
        assert hooks.counts() == {"pending": 0, "undelivered": 0, "delivered": 0, "dead": 1, "attempts": 8}
        assert hooks.dead_letters()[0]["reason"] == f"status {status}"
    assert len(there.posts) == 8
    for slept, gap in zip(clock.slept, [5, 30, 120, 600, 1800, 7200, 7200], strict=True):
        assert gap <= slept <= gap * 1.25
    assert len(set(clock.slept)) == 7  # jittered: the two of two hours differ


@in_loop
async def test_a_redirect_is_not_followed(bench: Bench) -> None:
    async with Receiver() as inner:
        for status in (301, 302, 303, 307, 308):
            async with Receiver(always(status, Location=f"{inner.origin}/inner")) as there:
                settings = bench.settings(there.origin, inner.origin, max_attempts=1)
                async with bench.running(settings) as hooks:
                    await one(bench, hooks, f"{there.origin}/", f"request-{status}")
            assert len(there.posts) == 1
    assert inner.posts == []


@pytest.mark.parametrize(
    ("said", "least", "most"),
    [("17", 17, 17), ("1000000000", 3600, 3600), ("9" * 4400, 3600, 3600), ("soon", 5, 6.25), ("-3", 5, 6.25),
     ("², ", 5, 6.25), ("1", 5, 6.25)],
    ids=["honoured", "capped", "endless", "garbage", "negative", "unicode", "less"],
)  # fmt: skip
@in_loop
async def test_retry_after(bench: Bench, said: str, least: float, most: float) -> None:
    async def answer(request: web.Request, before: int) -> web.Response:
        return web.Response(status=204) if before else web.Response(status=429, headers={"Retry-After": said})

    clock = Clock()
    async with Receiver(answer) as there, bench.running(bench.settings(there.origin), clock=clock) as hooks:
        await one(bench, hooks, f"{there.origin}/")
    assert len(there.posts) == 2
    (slept,) = clock.slept
    assert least <= slept <= most + 0.001


def test_retry_after_as_a_date() -> None:
    now = datetime.datetime(2026, 11, 26, 12, tzinfo=datetime.UTC).timestamp()
    assert seconds_of("Thu, 26 Nov 2026 12:01:40 GMT", now) == 100
    assert seconds_of("Thu, 26 Nov 2026 12:01:40 -0000", now) == 100
    assert seconds_of("Thu, 26 Nov 2026 11:00:00 GMT", now) == 0
    assert seconds_of("Thu, 26 Nov 9999 12:00:00 GMT", now) == 3600
    assert seconds_of("Thu, 99 Nov 2026 12:00:00 GMT", now) == 0
    assert seconds_of(None, now) == 0


@in_loop
async def test_a_receiver_that_never_answers_is_left(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "TOTAL_S", 0.2)

    async def never(request: web.Request, before: int) -> web.Response:
        return await forever()  # type: ignore[no-any-return]

    async with Receiver(never) as there:
        async with bench.running(bench.settings(there.origin, max_attempts=2)) as hooks:
            await one(bench, hooks, f"{there.origin}/")
            assert hooks.dead_letters()[0]["reason"] == "timed out"
        assert len(there.posts) == 2


@pytest.mark.parametrize(("status", "delivered"), [(200, 1), (500, 0)])
@in_loop
async def test_an_endless_answer_is_not_read(bench: Bench, status: int, delivered: int) -> None:
    """Its status is all that is asked for."""
    cut = asyncio.Event()

    async def endless(request: web.Request, before: int) -> web.StreamResponse:
        response = web.StreamResponse(status=status)
        await response.prepare(request)
        try:
            while True:
                await response.write(b"x" * 65536)
        finally:
            cut.set()

    async with Receiver(endless) as there, bench.running(bench.settings(there.origin, max_attempts=1)) as hooks:
        await one(bench, hooks, f"{there.origin}/")
        await cut.wait()
        assert hooks.counts()["delivered"] == delivered


@in_loop
async def test_endless_headers_are_a_failed_attempt(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "TOTAL_S", 1.0)

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        try:
            while True:
                writer.write(b"x: y\r\n" * 1000)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(endless, "127.0.0.1", 0)
    async with server:
        origin = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with bench.running(bench.settings(origin, max_attempts=1)) as hooks:
            await one(bench, hooks, f"{origin}/")
            assert hooks.counts()["dead"] == 1


@in_loop
async def test_a_thousand_webhooks_to_a_dead_host(bench: Bench) -> None:
    """Nobody listens: the queue has an end, each is given up at the cap, and others are served meanwhile."""
    go = asyncio.Event()

    async def answer(request_id: str, order: dict[str, Any], audio: Path) -> dict[str, Any]:
        await go.wait()
        return {"request_id": request_id}

    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    dead = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()
    await server.wait_closed()
    async with Receiver() as there:
        settings = bench.settings(dead, there.origin, max_attempts=2, max_jobs=1000)
        async with bench.running(settings, answer) as hooks:
            await asyncio.gather(*(hooks.accept(f"dead-{n}", f"{dead}/", {}, bench.audio(b"x")) for n in range(999)))
            await hooks.accept("alive", f"{there.origin}/", {}, bench.audio(b"x"))
            assert hooks.counts()["pending"] == 1000
            with pytest.raises(SpoolFullError, match="too many"):
                await hooks.accept("more", f"{dead}/", {}, bench.audio(b"x"))
            go.set()
            await until(ended(hooks))
            counts = hooks.counts()
            assert (counts["dead"], counts["delivered"], counts["attempts"]) == (999, 1, 2 * 999 + 1)
            letters = hooks.dead_letters()
    assert {letter["reason"] for letter in letters} == {"cannot connect: Connection refused"}
    assert [post.id for post in there.posts] == ["alive"]
    assert not list((bench.spool / "jobs").iterdir())


@in_loop
async def test_a_host_that_hangs_holds_up_no_other(bench: Bench) -> None:
    release = asyncio.Event()
    at_once = 0

    async def hang(request: web.Request, before: int) -> web.Response:
        nonlocal at_once
        at_once = max(at_once, len(slow.posts) - done)
        await release.wait()
        finish()
        return web.Response(status=204)

    done = 0

    def finish() -> None:
        nonlocal done
        done += 1

    async with Receiver(hang) as slow, Receiver() as quick:
        origins = [f"http://slow.example:{slow.port}", f"http://quick.example:{quick.port}"]
        resolve = names(slow="127.0.0.1", quick="127.0.0.1")
        async with bench.running(bench.settings(*origins), resolve=resolve) as hooks:
            for n in range(50):
                await hooks.accept(f"slow-{n}", f"{origins[0]}/", {}, bench.audio())
            await hooks.accept("quick", f"{origins[1]}/", {}, bench.audio())
            await until(lambda: hooks.counts()["delivered"] == 1)
            await until(lambda: hooks.counts()["undelivered"] == 50)
            assert [post.id for post in quick.posts] == ["quick"]
            release.set()
            await until(ended(hooks))
            assert hooks.counts()["delivered"] == 51
    assert at_once == webhook.DELIVERIES_A_HOST


# --- whom it calls ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allow", "then", "dialled"),
    [
        ((), "127.0.0.1", False),
        ((), "::ffff:127.0.0.1", False),
        ((), "93.184.216.34 127.0.0.1", False),  # one of two
        ((), "127.0.0.1 93.184.216.34", False),
        (("rebind.example",), "127.0.0.1", True),  # the same, allowed: the door would have seen it
        (("127.0.0.0/8",), "127.0.0.1", True),
        (("10.0.0.0/8",), "127.0.0.1", False),
    ],
)
@in_loop
async def test_a_name_that_leads_elsewhere_later_is_not_dialled(
    bench: Bench, allow: tuple[str, ...], then: str, dialled: bool
) -> None:
    leads_to = iter(["93.184.216.34"])

    async def resolve(host: str) -> Sequence[str]:
        return next(leads_to, then).split()

    async with Door() as door:
        url = f"https://rebind.example:{door.port}/"
        async with bench.running(bench.settings(*allow, max_attempts=3), resolve=resolve) as hooks:
            await hooks.check(url)
            next(leads_to, None)
            await one(bench, hooks, url)
            (letter,) = hooks.dead_letters()
    assert letter["attempts"] == 3
    assert door.connections == (3 if dialled else 0)
    assert letter["reason"].startswith("address not allowed") != dialled
    assert "127.0" not in json.dumps(letter)


@in_loop
async def test_an_address_that_is_allowed_no_longer_is_not_dialled(bench: Bench) -> None:
    """Accepted, stopped, the settings narrowed, started."""
    async with Door() as door:
        urls = [f"http://127.0.0.1:{door.port}/", f"https://127.0.0.1:{door.port}/"]
        settings = bench.settings("127.0.0.0/8", urls[0])
        async with bench.running(settings, forever) as hooks:
            for n, url in enumerate(urls):
                await hooks.accept(f"request-{n}", url, ORDER, bench.audio())
        async with bench.running(bench.settings(max_attempts=1)) as hooks:
            await until(ended(hooks))
            assert hooks.counts()["dead"] == 2
    assert door.connections == 0


@in_loop
async def test_an_international_name_is_dialled_as_it_is_written(bench: Bench) -> None:
    asked = []

    async def resolve(host: str) -> Sequence[str]:
        asked.append(host)
        return ["127.0.0.1"]

    async with Receiver() as there:
        origin = f"http://xn--bcher-kva.example:{there.port}"
        async with bench.running(bench.settings(origin), resolve=resolve) as hooks:
            await one(bench, hooks, f"{origin}/")
    assert [post.headers["host"] for post in there.posts] == [origin.removeprefix("http://")]
    assert asked == ["xn--bcher-kva.example"]


@in_loop
async def test_check(bench: Bench) -> None:
    resolve = names(public="93.184.216.34 2606:4700::1", inner="10.0.0.1", mixed="93.184.216.34 10.0.0.1", none="")
    settings = bench.settings("http://allowed:9000")
    async with bench.running(settings, resolve=resolve) as hooks:
        for url in ("https://public.example/x", "https://later.example/", "https://none.example/"):
            await hooks.check(url)
        await hooks.check("http://allowed:9000/x")
        for url in ("https://inner.example/", "https://mixed.example/", "https://127.0.0.1/", "https://[::1]/"):
            with pytest.raises(WebhookRefusedError, match="public") as caught:
                await hooks.check(url)
            assert "10.0.0.1" not in str(caught.value)
        for url in (
            "x",
            "ftp://h/",
            "http://",
            "http://public.example/",
            "https://h/" + "a" * 5000,
            "javascript:x",
        ):
            with pytest.raises(WebhookRefusedError):
                await hooks.check(url)
            with pytest.raises(WebhookRefusedError):
                await hooks.accept("request-1", url, ORDER, bench.audio())
        assert bench.left() == []


@in_loop
async def test_a_name_server_that_is_silent_does_not_hold_the_caller(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "CHECK_DNS_S", 0.05)
    async with bench.running(bench.settings(), resolve=forever) as hooks:
        await hooks.check("https://silent.example/")


def certificate(folder: Path, *hosts: str) -> tuple[Path, Path]:
    """A certificate that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    unused = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign", "encipher_only",
         "decipher_only"), False,
    )  # fmt: skip
    usage = x509.KeyUsage(digital_signature=True, key_cert_sign=True, **unused)  # Python 3.13 asks for it
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = folder / "cert.pem", folder / "key.pem"
    cert_file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return cert_file, key_file


@in_loop
async def test_the_checked_address_is_dialled_under_its_name(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """TLS asks for the name and checks it, `Host` says it; a certificate of another name is refused."""
    cert, key = certificate(bench.folder, "hooks.example")
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    asked_for: list[str | None] = []
    context.sni_callback = lambda _socket, name, _context: asked_for.append(name)
    async with Receiver(tls=context) as there:
        settings = bench.settings("127.0.0.0/8", max_attempts=1)
        async with bench.running(settings, resolve=names(hooks="127.0.0.1", other="127.0.0.1")) as hooks:
            await one(bench, hooks, f"https://hooks.example:{there.port}/x")
            assert hooks.counts()["delivered"] == 1
            await one(bench, hooks, f"https://other.example:{there.port}/x", "request-2")
            await one(bench, hooks, f"https://127.0.0.1:{there.port}/x", "request-3")
            assert [letter["reason"][:10] for letter in hooks.dead_letters()] == ["TLS failed"] * 2
    (post,) = there.posts
    assert post.headers["host"] == f"hooks.example:{there.port}"
    assert asked_for[:2] == ["hooks.example", "other.example"]


# --- answers ----------------------------------------------------------------------------------------------------------


@in_loop
async def test_answers_are_made_in_order_of_acceptance(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that an earlier process left."""
    monkeypatch.setattr(webhook, "ANSWERS", 1)  # several at once begin in this order, and may then pass each other
    begun: list[str] = []

    async def answer(request_id: str, order: dict[str, Any], audio: Path) -> dict[str, Any]:
        begun.append(request_id)
        return {}

    ids = [f"request-{n}" for n in range(12)]
    async with Receiver() as there:
        settings = bench.settings(there.origin)
        async with bench.running(settings, forever) as hooks:
            for request_id in ids[:6]:
                await hooks.accept(request_id, f"{there.origin}/", ORDER, bench.audio())
        async with bench.running(settings, answer) as hooks:
            for request_id in ids[6:]:
                await hooks.accept(request_id, f"{there.origin}/", ORDER, bench.audio())
            await until(ended(hooks))
    assert begun == ids


@in_loop
async def test_a_few_answers_are_made_at_a_time(bench: Bench) -> None:
    running = most = 0
    full = asyncio.Event()

    async def answer(request_id: str, order: dict[str, Any], audio: Path) -> dict[str, Any]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        if most == webhook.ANSWERS:
            full.set()
        await full.wait()
        await asyncio.sleep(0.01)
        running -= 1
        return {}

    async with Receiver() as there, bench.running(bench.settings(there.origin), answer) as hooks:
        for n in range(8):
            await hooks.accept(f"request-{n}", f"{there.origin}/", ORDER, bench.audio())
        await until(ended(hooks))
    assert most == webhook.ANSWERS


@pytest.mark.parametrize("raised", [RuntimeError("engine down"), OSError("gone"), asyncio.CancelledError()])
@in_loop
async def test_an_engine_that_is_down_is_waited_for(bench: Bench, raised: BaseException) -> None:
    """`CancelledError` too: what Ray raises for a call whose engine goes down."""
    clock = Clock()
    tries = 0

    async def answer(request_id: str, order: dict[str, Any], audio: Path) -> dict[str, Any]:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise raised
        return await transcribed(request_id, order, audio)

    async with Receiver() as there, bench.running(bench.settings(there.origin), answer, clock=clock) as hooks:
        await one(bench, hooks, f"{there.origin}/")
    (post,) = there.posts
    assert json.loads(post.body)["bytes"] == len(AUDIO)
    assert [slept // gap for slept, gap in zip(clock.slept, [5, 30, 120], strict=True)] == [1, 1, 1]


@in_loop
async def test_an_engine_that_stays_down_ends_in_a_failed_answer(bench: Bench) -> None:
    tries = 0

    async def answer(request_id: str, order: dict[str, Any], audio: Path) -> dict[str, Any]:
        nonlocal tries
        tries += 1
        return {"never": float("nan")}  # no JSON: as good as raised

    async with Receiver() as there, bench.running(bench.settings(there.origin), answer) as hooks:
        await one(bench, hooks, f"{there.origin}/")
        assert hooks.counts()["delivered"] == 1
    (post,) = there.posts
    why = json.loads(post.body)["failed"]
    assert f"{tries} tries" in why
    assert "ValueError" in why
    assert tries == webhook.MOST_TRIES
    assert bench.left() == []


@in_loop
async def test_logs_hold_no_urls(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="serve_app")
    async with Receiver(always(500)) as there:
        settings = bench.settings(there.origin, max_attempts=2, secret="whsec_c2VjcmV0")
        async with bench.running(settings) as hooks:
            await one(bench, hooks, f"{there.origin}/private-path?token=private")
    assert "given up after 2 attempts: status 500" in caplog.text
    for secret in ("private", "c2VjcmV0", "größer"):
        assert secret not in caplog.text
