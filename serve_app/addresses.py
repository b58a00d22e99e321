"""Whom the server may call on a caller's behalf: a URL is read once, strictly, and what is dialled was checked.

Readers of URLs disagree about odd ones (`https://a\\@b/`, `https://0x7f.1/`), and who checks with one and dials with
another can be fooled. So only plain forms pass, and the URL that is dialled is put together from the parts that were
checked. A name is resolved once, every one of its addresses must be public or allowed, and those very addresses are
dialled, by name for TLS and `Host`. Knows URLs, DNS and IP networks, not what is sent.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from pipeline.errors import ConfigError, MurmurError

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Resolve = Callable[[str], Awaitable[Sequence[str]]]  # a name's addresses; OSError where it has none

LONGEST_URL = 2048  # characters
DNS_THREADS = 16  # look-ups at once: one whose server is silent takes 10 s and more, and cannot be cut short

_PORTS = {"http": 80, "https": 443}
_ODD = re.compile(r"[^\x21-\x7e]|[\\\"<>^`{|}]")  # what no URL may hold as it is: readers mend these in various ways
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://([^/?#]*)(/[^?#]*)?(\?[^#]*)?(?:#.*)?", re.IGNORECASE)
_AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::([0-9]{1,5}))?")
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")  # a last label that makes the system's resolver read the name as IPv4

# Explicit, since `ipaddress` goes by the registry of its Python: 100.64/10 is not private to it, and CVE-2024-4032.
_CLOSED_V4 = tuple(map(IPv4Network, (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "224.0.0.0/4", "240.0.0.0/4",
    "168.63.129.16/32",  # looks public; inside Azure it is the host of the virtual machine
)))  # fmt: skip
# Of IPv6 only this is given out to the public net: outside lie ::, ::1, fc00::/7, fe80::/10, ff00::/8, 64:ff9b:1::/48.
_OPEN_V6 = IPv6Network("2000::/3")
_CLOSED_V6 = tuple(map(IPv6Network, (
    "2001::/23",  # protocol assignments: Teredo, benchmarks, ORCHID
    "2001:db8::/32", "3fff::/20",  # documentation
    "2002::/16",  # 6to4: a relay, if one is left, sends it on to the IPv4 address inside
)))  # fmt: skip
_NAT64 = IPv6Network("64:ff9b::/96")
_ISATAP = {0x00005EFE, 0x02005EFE}  # third quarter of an address that holds an IPv4 address in its last


class WebhookRefusedError(MurmurError):
    """An address that may not be called. Its text is for the caller: it never says what a name resolves to."""

    kind = "webhook_refused"


@dataclass(frozen=True, slots=True)
class Target:
    """A URL's parts, read."""

    scheme: str
    host: str  # lower case; an IPv6 address without brackets
    port: int
    path: str  # with the query, as it was given
    address: Address | None  # where the host is one

    @property
    def origin(self) -> tuple[str, str, int]:
        return self.scheme, self.host, self.port

    @property
    def url(self) -> URL:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == _PORTS[self.scheme] else f":{self.port}"
        return URL(f"{self.scheme}://{host}{port}{self.path}", encoded=True)


@dataclass(frozen=True, slots=True)
class Rules:
    """Who may be called: every public address over https, and what is named here."""

    hosts: frozenset[str]  # over https, wherever the name leads
    networks: tuple[Network, ...]  # over https
    origins: frozenset[tuple[str, str, int]]  # wherever the name leads; the only ones that plain http is for

    @classmethod
    def parse(cls, entries: Iterable[str]) -> Rules:
        """From `host`, `10.0.0.0/8` (or one address) and `http://127.0.0.1:9000`. Raises `ConfigError`."""
        hosts, networks, origins = set(), [], set()
        for entry in entries:
            try:
                if "://" in entry:
                    target = read(entry)
                    if target.path != "/" or "#" in entry:
                        raise WebhookRefusedError("an origin has no path")
                    origins.add(target.origin)
                elif (network := _network(entry)) is not None:
                    networks.append(network)
                else:
                    hosts.add(_name(entry.lower()))
            except (WebhookRefusedError, ValueError) as error:
                raise ConfigError(
                    f"webhook.allow: {entry!r}: {error}; give a host name, a network (10.0.0.0/8) or an origin "
                    "(http://127.0.0.1:9000)"
                ) from None
        return cls(frozenset(hosts), tuple(networks), frozenset(origins))

    def target(self, url: str) -> Target:
        """`url`, read, if its form and scheme are allowed; nothing is resolved. Raises `WebhookRefusedError`."""
        target = read(url)
        if target.scheme != "https" and target.origin not in self.origins:
            raise WebhookRefusedError("only https addresses are called")
        if target.address is not None:
            self.check(target, [str(target.address)])
        return target

    def trusts(self, target: Target) -> bool:
        """Whether it is allowed by name: wherever that leads."""
        return target.origin in self.origins or (target.scheme == "https" and target.host in self.hosts)

    def check(self, target: Target, addresses: Iterable[str]) -> None:
        """Raise `WebhookRefusedError` unless every one of the target's addresses may be dialled."""
        if not self.trusts(target) and not all(self._opens(address) for address in addresses):
            raise WebhookRefusedError("the host is not on the public net")

    def _opens(self, text: str) -> bool:
        try:
            address = unwrap(ip_address(text))
        except ValueError:
            return False
        return is_public(address) or any(address in network for network in self.networks)


def read(url: str) -> Target:
    """The parts of an http(s) URL that every reader takes for the same. Raises `WebhookRefusedError`."""
    if len(url) > LONGEST_URL:
        raise WebhookRefusedError(f"longer than {LONGEST_URL} characters")
    if _ODD.search(url):
        raise WebhookRefusedError("holds a character that a URL cannot hold as it is; percent-encode it")
    parts = _URL.fullmatch(url)
    if parts is None:
        raise WebhookRefusedError("not an absolute https URL")
    scheme, authority, path, query = (part or "" for part in parts.groups())
    scheme = scheme.lower()
    if scheme not in _PORTS:
        raise WebhookRefusedError("only https addresses are called")
    if "@" in authority:
        raise WebhookRefusedError("holds a user name; none is sent")
    found = _AUTHORITY.fullmatch(authority.lower())
    if found is None:
        raise WebhookRefusedError("has no host, or one that is not a plain name or address")
    v6, name, port = found.groups()
    port_number = int(port) if port else _PORTS[scheme]
    if not 0 < port_number < 65536:
        raise WebhookRefusedError("has no such port")
    address = _v6(v6) if v6 else _v4(name)
    host = str(address) if address is not None else _name(name)
    target = Target(scheme, host, port_number, (path or "/") + query, address)
    if not _reads_alike(target):
        raise WebhookRefusedError("its host is not a plain name")
    return target


def _reads_alike(target: Target) -> bool:
    """Whether aiohttp's own reader finds the same; it also decodes xn-- names, and fails at some."""
    try:
        return bool(target.url.host) and (target.url.raw_host, target.url.port) == (target.host, target.port)
    except ValueError:
        return False


def _v6(text: str) -> IPv6Address:
    try:
        return IPv6Address(text)
    except ValueError:
        raise WebhookRefusedError("its host is not an IPv6 address") from None


def _v4(name: str) -> IPv4Address | None:
    """The address, or None for a name. Of its written forms only 192.0.2.1 passes: 127.1 and 0x7f000001 are traps."""
    if not _NUMBER.fullmatch(name.rpartition(".")[2]):
        return None
    try:
        return IPv4Address(name)
    except ValueError:
        raise WebhookRefusedError("its host is a number, and not a plain IPv4 address") from None


def _name(name: str) -> str:
    if len(name) > 253 or _v4(name) or not all(_LABEL.fullmatch(label) for label in name.split(".")):
        raise WebhookRefusedError("its host is not a plain name")
    return name


def _network(entry: str) -> Network | None:
    try:
        return ip_network(entry)
    except ValueError:
        if "/" in entry or ":" in entry:
            raise
        return None


def unwrap(address: Address) -> Address:
    """The IPv4 address that the system, or a gateway, takes an IPv6 address for; else the address itself."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:  # how a host without IPv4 reaches the whole IPv4 net
            return IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def is_public(address: Address) -> bool:
    """Whether it leads out of this host, its networks and its provider's, whatever wraps it."""
    address = unwrap(address)
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _CLOSED_V4)
    if address.scope_id is not None or address not in _OPEN_V6 or any(address in network for network in _CLOSED_V6):
        return False
    inside = int(address)
    return (inside >> 32) & 0xFFFFFFFF not in _ISATAP or is_public(IPv4Address(inside & 0xFFFFFFFF))


class Dns:
    """The system's resolver, in threads of its own: a name server that is silent holds up nothing else."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(DNS_THREADS, thread_name_prefix="dns")

    async def __call__(self, host: str) -> list[str]:
        return await asyncio.get_running_loop().run_in_executor(self._pool, _look_up, host)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _look_up(host: str) -> list[str]:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class CheckedResolver(AbstractResolver):
    """What aiohttp asks for the addresses of one target's host: it gets those that were checked, or the refusal.

    It is not asked where the host is an address; `Rules.target` has checked that one.
    """

    def __init__(self, rules: Rules, target: Target, resolve: Resolve) -> None:
        self._rules, self._target, self._resolve = rules, target, resolve

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        if (host, port) != (self._target.host, self._target.port):
            raise WebhookRefusedError("not the host that was checked")
        addresses = list(await self._resolve(host))
        if not addresses:
            raise OSError("no address")
        self._rules.check(self._target, addresses)
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        pass
