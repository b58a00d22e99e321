"""Whom a webhook may call: how URLs are written, and where their names lead."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from ipaddress import ip_address

import pytest

from pipeline.errors import ConfigError
from serve_app.addresses import CheckedResolver, Dns, Rules, WebhookRefusedError, is_public, read

PUBLIC = Rules.parse(())


@pytest.mark.parametrize(
    "url",
    [
        "x",
        "",
        "//h/",
        "https:",
        "https:/h/",
        "https:h",
        "https://",
        "http://",
        "https:///path",
        "https://?q",
        "https://:443/",
        "ftp://h/",
        "javascript:alert(1)",
        "file:///etc/passwd",
        "data:text/plain,x",
        "gopher://h/",
        "https://h/" + "a" * 5000,
        "https://h/\r\nX-Other: 1",
        "https://h/\n",
        "\thttps://h/",
        " https://h/",
        "https://h/ ",
        "https://h/a b",
        "https://h/\x00",
        "https://h/\x7f",
        "https://hé/",
        "https://ｈ/",  # a full-width letter, which IDNA makes an h
        "https://１２７.0.0.1/",
        "https://h。x/",
        "https://user@h/",
        "https://user:secret@h/",
        "https://@h/",
        "https://a\\@h/",
        "https:\\\\h\\",
        "https://h\\.x/",
        "https://h%2ex/",
        "https://h%00/",
        "https://h:0/",
        "https://h:65536/",
        "https://h:-1/",
        "https://h:+1/",
        "https://h:/",
        "https://h:80:80/",
        "https://h:x/",
        "https://h./",
        "https://127.0.0.1./",
        "https://.h/",
        "https://h..x/",
        "https://-h/",
        "https://h-/",
        "https://" + "a" * 64 + "/",
        "https://" + "a." * 130 + "b/",
        "https://2130706433/",
        "https://0x7f000001/",
        "https://0x7f.0.0.1/",
        "https://0x7f.1/",
        "https://127.0.0.0x1/",
        "https://0177.0.0.1/",
        "https://127.1/",
        "https://127.0.1/",
        "https://0/",
        "https://1.2.3.4.5/",
        "https://256.1.1.1/",
        "https://08.8.8.8/",
        "https://x.0x/",
        "https://xn--a/",  # decodes to nothing
        "https://[::1/",
        "https://::1/",
        "https://[::1]x/",
        "https://[fe80::1%25eth0]/",
        "https://[2606:4700::1%eth0]/",
        "https://[::ffff:0x7f.1]/",
        "https://[v1.x]/",
        "https://[]/",
        "https://[1.2.3.4]/",
    ],
)
def test_a_url_that_readers_could_take_for_two_things_is_refused(url: str) -> None:
    """Also where all is allowed: by its form alone."""
    for rules in (PUBLIC, Rules.parse(["0.0.0.0/0", "::/0", "h"])):
        with pytest.raises(WebhookRefusedError):
            rules.target(url)


@pytest.mark.parametrize(
    ("url", "dialled"),
    [
        ("https://hooks.example/", "https://hooks.example/"),
        ("https://hooks.example", "https://hooks.example/"),
        ("HTTPS://Hooks.EXAMPLE:443/A", "https://hooks.example/A"),
        ("https://hooks.example:8443?a=b%20c&d=%2F#part", "https://hooks.example:8443/?a=b%20c&d=%2F"),
        ("https://h//a/../b/%2e%2e/c;d=1", "https://h//a/../b/%2e%2e/c;d=1"),  # as it was given, to the letter
        ("https://a_b.xn--bcher-kva.example/", "https://a_b.xn--bcher-kva.example/"),
        ("https://8.8.8.8/", "https://8.8.8.8/"),
        ("https://1.2.3.com/", "https://1.2.3.com/"),
        ("https://[2606:4700:0::1111]:9000/x", "https://[2606:4700::1111]:9000/x"),
        ("https://h/user@x:y", "https://h/user@x:y"),  # no user info there
    ],
)
def test_a_plain_url_is_dialled_as_it_was_checked(url: str, dialled: str) -> None:
    target = PUBLIC.target(url)
    assert str(target.url) == dialled
    assert (target.url.raw_host, target.url.port, target.url.user) == (target.host, target.port, None)


CLOSED = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.100.100.200", "100.127.255.255", "127.0.0.1",
    "127.255.255.254", "169.254.0.1", "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.0.192",
    "192.0.2.1", "192.88.99.1", "192.168.0.1", "198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1",
    "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "168.63.129.16",
    "::", "::1", "::127.0.0.1", "::8.8.8.8", "100::1", "fc00::1", "fd00:ec2::254", "fe80::1", "febf::1", "fec0::1",
    "ff02::1", "64:ff9b:1::8.8.8.8", "5f00::1", "4000::1", "fe80::1%eth0", "2606:4700::1%eth0",
    "2001::1",  # Teredo
    "2001:2::1", "2001:10::1", "2001:20::1", "2001:db8::1", "3fff::1", "2002:7f00:1::1", "2002:808:808::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::ffff:100.64.0.1", "::ffff:0:127.0.0.1",
    "64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b::10.0.0.1",
    "2606:4700::5efe:10.0.0.1", "2606:4700::200:5efe:127.0.0.1",  # ISATAP
]  # fmt: skip
OPEN = [
    "1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255", "128.0.0.0",
    "169.253.255.255", "172.15.255.255", "172.32.0.0", "192.167.255.255", "192.169.0.0", "223.255.255.255",
    "2606:4700::1111", "2001:4860:4860::8888", "2a00:1450::1", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8",
    "2606:4700::5efe:8.8.8.8",
]  # fmt: skip


@pytest.mark.parametrize("address", CLOSED)
def test_what_is_not_public_is_not_dialled(address: str) -> None:
    assert not is_public(ip_address(address))
    target = PUBLIC.target("https://hooks.example/")
    with pytest.raises(WebhookRefusedError):
        PUBLIC.check(target, ["8.8.8.8", address])  # every address counts, not one
    if "%" not in address:
        with pytest.raises(WebhookRefusedError):
            PUBLIC.target(f"https://[{address}]/" if ":" in address else f"https://{address}/")


@pytest.mark.parametrize("address", OPEN)
def test_what_is_public_is_dialled(address: str) -> None:
    assert is_public(ip_address(address))
    PUBLIC.check(PUBLIC.target("https://hooks.example/"), [address, "8.8.8.8"])
    PUBLIC.target(f"https://[{address}]/" if ":" in address else f"https://{address}/")


def test_what_is_no_address_is_not_dialled() -> None:
    with pytest.raises(WebhookRefusedError):
        PUBLIC.check(PUBLIC.target("https://hooks.example/"), ["hooks.example"])


def refused(rules: Rules, url: str, *addresses: str) -> bool:
    try:
        rules.check(rules.target(url), addresses)
    except WebhookRefusedError:
        return True
    return False


def test_plain_http_needs_its_origin() -> None:
    assert refused(PUBLIC, "http://8.8.8.8/")
    assert refused(Rules.parse(["h", "8.8.8.8"]), "http://8.8.8.8/")
    assert refused(Rules.parse(["h", "8.8.8.8"]), "http://h/", "8.8.8.8")


def test_an_allowed_origin_opens_exactly_that() -> None:
    rules = Rules.parse(["http://127.0.0.1:9000", "https://inner:8443/", "HTTP://[::1]:9000"])
    assert not refused(rules, "http://127.0.0.1:9000/any?x=1")
    assert not refused(rules, "http://[0:0::1]:9000/")
    assert not refused(rules, "https://INNER:8443/", "10.0.0.1")
    for other in ("http://127.0.0.1:9001/", "http://127.0.0.2:9000/", "https://127.0.0.1:9000/", "http://127.0.0.1/"):
        assert refused(rules, other)
    for other in ("https://inner/", "https://inner:8444/", "http://inner:8443/", "https://a.inner:8443/"):
        assert refused(rules, other, "10.0.0.1")


def test_an_allowed_network_opens_exactly_that() -> None:
    rules = Rules.parse(["10.1.0.0/16", "192.168.7.7", "fd00:1::/32"])
    for inside in ("10.1.255.255", "192.168.7.7", "fd00:1::5", "::ffff:10.1.0.1", "64:ff9b::10.1.0.1"):
        assert not refused(rules, "https://h/", inside)
    assert not refused(rules, "https://10.1.2.3/")
    for outside in ("10.2.0.0", "192.168.7.8", "fd00:2::5", "127.0.0.1", "::ffff:10.2.0.1"):
        assert refused(rules, "https://h/", "10.1.0.1", outside)
    assert refused(rules, "http://10.1.2.3/")


def test_an_allowed_host_opens_exactly_that() -> None:
    rules = Rules.parse(["Inner.example"])
    assert not refused(rules, "https://inner.example:8443/", "127.0.0.1")
    assert refused(rules, "https://a.inner.example/", "127.0.0.1")
    assert refused(rules, "https://example/", "127.0.0.1")


@pytest.mark.parametrize(
    "entry",
    ["", "*.example", "h:9000", "10.0.0.1/8", "10.0.0.0/33", "http://h/path", "http://h?q", "http://h/#f", "ftp://h",
     "http://", "127.1", "h.", "u@h", "https://u@h"],
)  # fmt: skip
def test_an_entry_that_opens_nothing_is_told(entry: str) -> None:
    with pytest.raises(ConfigError, match=r"webhook\.allow"):
        Rules.parse([entry])


def test_a_refusal_does_not_say_where_a_name_leads() -> None:
    with pytest.raises(WebhookRefusedError) as caught:
        PUBLIC.check(PUBLIC.target("https://hooks.example/"), ["10.11.12.13"])
    assert "10.11" not in str(caught.value)


def test_the_resolver_gives_what_was_checked_and_nothing_else() -> None:
    async def scenario() -> None:
        asked = []

        async def resolve(host: str) -> Sequence[str]:
            asked.append(host)
            return ["8.8.8.8", "2606:4700::1111"]

        target = read("https://hooks.example:8443/")
        resolver = CheckedResolver(PUBLIC, target, resolve)
        found = await resolver.resolve("hooks.example", 8443)
        assert [(one["hostname"], one["host"], one["port"]) for one in found] == [
            ("hooks.example", "8.8.8.8", 8443),
            ("hooks.example", "2606:4700::1111", 8443),
        ]
        for other in (("other.example", 8443), ("hooks.example", 443)):
            with pytest.raises(WebhookRefusedError):
                await resolver.resolve(*other)
        assert asked == ["hooks.example"]

        async def nothing(_: str) -> Sequence[str]:
            return []

        with pytest.raises(OSError, match="no address"):
            await CheckedResolver(PUBLIC, target, nothing).resolve("hooks.example", 8443)

    asyncio.run(scenario())


def test_the_system_resolves_names() -> None:
    async def scenario() -> None:
        dns = Dns()
        try:
            found = await dns("localhost")
            assert found
            assert not any(is_public(ip_address(address)) for address in found)
            with pytest.raises(OSError):  # noqa: PT011 - each system has its own text for this
                await dns("no-such-host.invalid")
        finally:
            dns.close()

    asyncio.run(scenario())
