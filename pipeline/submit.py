"""`murmur submit`: one of our commands as a job of a Ray cluster, followed to its end, with its own exit code.

The command runs on the cluster's head node, in what is installed there. This page knows Ray's job API and which of a
command's arguments name files; what the command does is not its business. Ray keeps a job's entry point and its
environment, and shows them to whoever may ask: so nothing secret is put there.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from pipeline.config import ENV_ELSEWHERE, ENV_PREFIX
from pipeline.errors import EXIT_OK, MurmurError, UsageError, redact

EXIT_UNKNOWN = 1  # Ray itself failed the job: its command has no exit code
EXIT_STOPPED = 143  # `ray job stop` sends SIGTERM

_STOP_WAIT_S = 30  # from SIGTERM to SIGKILL; Ray's own 3 s are less than a commit can take
_PATIENCE_S = 300.0  # how long a cluster may be out of reach before following its job is given up
_LOOK_EVERY_S = 2.0
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
# Variables that name a secret's place are none themselves.
_SECRET = re.compile(r"(SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|CONNECTION_STRING|_KEY$)(?!.*_(FILE|PATH|ID)$)")
_NOT_SECRET = {"GOOGLE_APPLICATION_CREDENTIALS"}  # a path


@dataclass(frozen=True, slots=True)
class Command:
    """A command line of ours, and what in it names files, as its own parser found them."""

    arguments: tuple[str, ...]  # without `murmur`
    inputs: tuple[str, ...] = ()
    output: str | None = None
    config_file: Path | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """How a command is submitted. `runtime_env` is a YAML file of Ray's; `env` are KEY=VALUE texts."""

    submission_id: str | None = None
    runtime_env: Path | None = None
    working_dir: str | None = None
    env: tuple[str, ...] = ()
    entrypoint_num_cpus: float | None = None


class Job:
    """A job on a cluster: submitted here or, by its id, before."""

    def __init__(self, client: Any, id: str) -> None:
        self._client, self.id = client, id
        self._seen = 0  # characters of its log

    @property
    def address(self) -> str:
        return str(self._client.get_address())

    def status(self) -> str:
        """Ray's word for it: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
        return str(self._details().status.value)

    def follow(self, write: Callable[[str], object]) -> int:
        """Hand the job's log to `write` until it ends, and return the exit code of its command.

        A connection that breaks is taken up again where it broke off. Raises `MurmurError` where the cluster stays
        out of reach; the job may go on all the same.
        """
        heard_at = time.monotonic()
        while True:
            seen = self._seen
            try:
                asyncio.run(self._pass_on_log(write))
                details = self._details()
            except _broken_connections() as error:
                heard_at = time.monotonic() if self._seen > seen else heard_at
                if time.monotonic() - heard_at > _PATIENCE_S:
                    raise MurmurError(f"job {self.id}: out of reach, and may go on ({_line(error)})") from None
            else:
                heard_at = time.monotonic()
                if details.status.is_terminal():
                    if details.driver_exit_code is None and details.message:
                        write(f"{_line(details.message)}\n")
                    return exit_code(details)
            time.sleep(_LOOK_EVERY_S)

    async def _pass_on_log(self, write: Callable[[str], object]) -> None:
        """What was not seen yet. A log is always sent from its beginning."""
        position = 0
        async for text in self._client.tail_job_logs(self.id):
            write(text[max(0, self._seen - position) :])
            position += len(text)
            self._seen = max(self._seen, position)

    def _details(self) -> Any:
        return self._client.get_job_info(self.id)


def exit_code(job: Any) -> int:
    """What the job's command ended with. Ray's word tells success from failure; the number is kept beside it."""
    if job.status == "STOPPED":
        return EXIT_STOPPED
    if job.driver_exit_code is None:
        return EXIT_OK if job.status == "SUCCEEDED" else EXIT_UNKNOWN
    code = int(job.driver_exit_code)
    return code if code >= 0 else 128 - code  # ended by a signal, as a shell says it


def submit(command: Command, options: Options, address: str | None, warn: Callable[[str], object]) -> Job:
    """Submit `command` to the cluster whose dashboard is at `address` (None: as the environment says, else here).

    Raises `UsageError` for what the cluster could not see, for secrets, and where no cluster answers.
    """
    refuse_secrets(command)
    runtime_env = read_runtime_env(options)
    client = _client(address)
    for line in invisible(command, _is_here(str(client.get_address())), runtime_env.get("working_dir")):
        warn(line)
    with _shipped(command, runtime_env) as (entry_point, shipped_env), _plain_refusals():
        id = client.submit_job(
            entrypoint=entry_point,
            submission_id=options.submission_id,
            runtime_env=shipped_env,
            entrypoint_num_cpus=options.entrypoint_num_cpus,
        )
    return Job(client, id)


def attach(id: str, address: str | None) -> Job:
    """The job that was submitted under `id` before. Raises `UsageError` where there is none."""
    job = Job(_client(address), id)
    with _plain_refusals():
        job.status()
    return job


# ---- what is refused before anything is sent


def refuse_secrets(command: Command) -> None:
    """Raises `UsageError` where an argument or the settings hold user info or a signature."""
    texts = [*command.arguments, _text(command.config_file) if command.config_file else ""]
    if any(redact(text) != text for text in texts):
        raise UsageError(
            "an argument or setting holds a secret (user info or a signature in a URL), and Ray shows a job's command: "
            "give the secret to the cluster's nodes, or list such URLs in a manifest on the store"
        )


def invisible(command: Command, is_here: bool, working_dir: str | None) -> Iterator[str]:
    """A warning for each path that only a cluster on this very machine can see.

    Raises `UsageError` for one that no cluster can. `file:///mnt/share` says that a path is the nodes' own.
    """
    named = [("input", path) for path in command.inputs] + ([("output", command.output)] if command.output else [])
    for what, path in named:
        if "://" in path or (what == "input" and working_dir and (Path(working_dir) / path).exists()):
            continue
        if not is_here or not os.path.isabs(path):
            raise UsageError(
                f"{what} {path} is a path on this machine, which the cluster does not see; use a store (s3://...), "
                f"--working-dir for a small input, or file:///... for what is mounted on every node"
            )
        yield f"{what} {path} is taken to be the cluster's own: its head seems to be this machine"


def read_runtime_env(options: Options) -> dict[str, Any]:
    """Ray's runtime environment for the job: the file's, with what the options and our own settings here add.

    Settings in this environment (`MURMUR_...`) travel along, or they would have no effect. Raises `UsageError`.
    """
    found = _mapping(options.runtime_env) if options.runtime_env else {}
    settings = {k: v for k, v in os.environ.items() if k.startswith(ENV_PREFIX) and k not in ENV_ELSEWHERE}
    given = dict(_assignment(text) for text in options.env)
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S), **settings, **(found.get("env_vars") or {}), **given}
    for name, value in variables.items():
        if (_SECRET.search(name) and name not in _NOT_SECRET) or redact(str(value)) != str(value):
            raise UsageError(f"{name} looks like a secret, and Ray keeps a job's environment: set it on the nodes")
    working_dir = {"working_dir": options.working_dir} if options.working_dir else {}
    return {**found, **working_dir, "env_vars": variables}


def _assignment(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise UsageError(f"--env {text!r}: expected KEY=VALUE")
    return name, value


def _mapping(file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(_text(file)) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"--runtime-env {file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise UsageError(f"--runtime-env {file}: expected keys and values, found {type(found).__name__}")
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: {getattr(error, 'strerror', None) or error}") from None


# ---- what is sent


@contextmanager
def _shipped(command: Command, runtime_env: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The entry point and the runtime environment with the settings file in it, while it is being sent.

    The file lies in the job's working directory: in the user's own, else in one made for it.
    """
    if command.config_file is None:
        yield _entry_point(command.arguments), runtime_env
        return
    working_dir = runtime_env.get("working_dir")
    if working_dir is not None:
        yield _entry_point(_with_config(command.arguments, _inside(command.config_file, working_dir))), runtime_env
        return
    with tempfile.TemporaryDirectory(prefix="murmur-submit-") as folder:
        name = Path(shutil.copy(command.config_file, folder)).name
        yield _entry_point(_with_config(command.arguments, name)), {**runtime_env, "working_dir": folder}


def _entry_point(arguments: Sequence[str]) -> str:
    """`exec`, so that the job's process is the command's own and no shell stands between it and a signal."""
    return f"exec murmur {shlex.join(arguments)}"


def _with_config(arguments: Sequence[str], file: str) -> tuple[str, ...]:
    """The arguments with another file of settings."""
    renamed = list(arguments)
    for i, argument in enumerate(arguments):
        if argument == "--config":
            renamed[i + 1] = file
        elif argument.startswith("--config="):
            renamed[i] = f"--config={file}"
    return tuple(renamed)


def _inside(file: Path, working_dir: str) -> str:
    try:
        return str(file.resolve().relative_to(Path(working_dir).resolve()))
    except ValueError:
        raise UsageError(f"--config {file} has to lie in the working directory {working_dir} to be sent") from None


# ---- Ray's job API


def _client(address: str | None) -> Any:
    """Ray's own. Raises `UsageError` where nothing answers or the token is wrong."""
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # it tells of every web socket
    with _plain_refusals(), _address_in_environment(address):
        return JobSubmissionClient(address)


@contextmanager
def _address_in_environment(address: str | None) -> Iterator[None]:
    """Ray lets its variables win over an address that it is given; what is said on the command line wins here."""
    variable = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(variable)
    if address is not None:
        os.environ[variable] = address
    try:
        yield
    finally:
        if before is not None:
            os.environ[variable] = before
        elif address is not None:
            del os.environ[variable]


@contextmanager
def _plain_refusals() -> Iterator[None]:
    """What Ray's client raises, in one line."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise UsageError(f"{_line(error)} (set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, the cluster's token)") from None
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise UsageError(f"Ray's job server: {_line(error)}") from None


def _broken_connections() -> tuple[type[BaseException], ...]:
    """What following a job raises when its connection breaks."""
    import aiohttp

    return (OSError, RuntimeError, aiohttp.ClientError)


def _is_here(address: str) -> bool:
    return urlsplit(address).hostname in _LOOPBACK


def _line(said: object) -> str:
    """The first line of what Ray says, without secrets."""
    lines = str(said).strip().splitlines()
    return redact(lines[0]) if lines else type(said).__name__
