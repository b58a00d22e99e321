"""The client of a running application: what the job's engine stage has where `engine: serve`, instead of a model.

    driver: `Application.find(config)` what it serves, before anything is started
    stage:  `ServedEngine`             its Units to the application's replicas, as if the engine were here

The application is `serve_app.deployment`'s; this page knows what its deployments are called and what they answer. A
model's engines are a deployment of their own, so that the job goes past the HTTP face.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.config import Config
from pipeline.engine import EngineInfo, EngineLoad
from pipeline.errors import ApplicationError, ConfigError, MurmurError
from pipeline.types import DecodeOptions, Unit, UnitResult

log = logging.getLogger(__name__)

_ANSWER_WITHIN_S = 300.0  # an application that is still loading its model answers when it has
_LOOK_EVERY_S = 10.0  # whether an application that has not answered is still there
_NODE_DEATH = "its node has died"  # Ray says so in words only


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What an engine deployment says of itself: `info` of one replica, and what a run's fingerprint needs."""

    info: EngineInfo
    weights: str  # hash of the weights
    revision: str | None


@dataclass(frozen=True, slots=True)
class Application:
    """A running application, as the job found it."""

    name: str
    model: ServedModel
    replicas: int

    @classmethod
    def find(cls, config: Config) -> Application:
        """The application that this run asks for; the caller is connected to its cluster.

        Raises `ConfigError` where it is not there, does not run, serves another model or dtype, or cannot honour the
        run's options.
        """
        name, deployment = config.serve.app, deployment_name(config.model)
        found = _running(name)
        if deployment not in found:
            raise ConfigError(f"serve.app {name!r} does not serve {config.model!r}; its deployments: {_listed(found)}")
        model = _describe(_handle(config), config)
        application = cls(name, model, max(1, found[deployment].replica_states.get("RUNNING", 0)))
        application.refuse_others(config)
        return application

    def refuse_others(self, config: Config) -> None:
        """Raises `ConfigError` where the run pins a dtype or revision that is not the application's."""
        for key, served in (("dtype", self.model.info.dtype), ("revision", self.model.revision)):
            asked = getattr(config, key)
            if asked not in (None, "auto", served):
                raise ConfigError(f"{key}: {asked}, and the application {self.name!r} runs {served}: leave it out")

    @property
    def is_on_gpu(self) -> bool:
        return self.model.info.device.startswith("cuda")


class ServedEngine:
    """The part of `pipeline.engine.Engine` that the stage uses, on the application's replicas.

    A replica that dies takes this process with it: to the run it was an engine that died, with what was in it. One
    that goes with its node has its Units sent to another.
    """

    def __init__(self, config: Config) -> None:
        self._app, self._looked_at = config.serve.app, time.monotonic()
        self._handle = _handle(config)
        self.info = _describe(self._handle, config).info

    async def submit(self, unit: Unit, options: DecodeOptions) -> UnitResult:
        """As `Engine.submit`. Raises `ApplicationError` where the application is gone."""
        answer = asyncio.ensure_future(self._asked(unit, options))
        try:
            while not answer.done():
                await asyncio.wait({answer}, timeout=_LOOK_EVERY_S)
                if not answer.done():  # without a replica Serve would wait for one for ever
                    await self._refuse_if_gone()
        finally:
            answer.cancel()
        return answer.result()

    async def _asked(self, unit: Unit, options: DecodeOptions) -> UnitResult:
        from ray.exceptions import ActorDiedError, ActorUnavailableError

        while True:
            try:
                with plain_serve_errors():
                    result: UnitResult = await self._handle.submit.remote(unit, options)
                    return result
            except ActorUnavailableError as error:
                log.warning("%s: %s; asked again", unit.recording.id, error)
                await asyncio.sleep(1.0)
            except ActorDiedError as error:
                if not error.preempted and _NODE_DEATH not in str(error):
                    log.error("a replica died with %s in it: %s", unit.recording.id, error)
                    os._exit(1)

    async def _refuse_if_gone(self) -> None:
        """One look for all Units in flight."""
        if time.monotonic() - self._looked_at < _LOOK_EVERY_S:
            return
        self._looked_at = time.monotonic()
        try:
            await asyncio.to_thread(_running, self._app)
        except ConfigError as error:
            raise ApplicationError(f"{error}; what is committed stays, the same command goes on from there") from None

    def load(self) -> EngineLoad:
        """No lanes are here, and a replica that stands still is Serve's to see."""
        return EngineLoad(0, 0, 0, 0.0)


def deployment_name(model: str) -> str:
    """Of the engines of the model with this id; Serve names files by it."""
    return "engine-" + re.sub(r"[^A-Za-z0-9._-]+", "--", model).strip("-")


def _handle(config: Config) -> Any:
    """Of the engines that this run asks for, in any process that is connected to their cluster."""
    from ray import serve

    try:
        return serve.get_deployment_handle(deployment_name(config.model), config.serve.app)
    except KeyError:
        raise ApplicationError(f"serve.app {config.serve.app!r} no longer serves {config.model!r}") from None


def _describe(handle: Any, config: Config) -> ServedModel:
    """What one replica says, once it is ready. Raises `ConfigError` for options that its model cannot honour."""
    with plain_serve_errors():
        model: ServedModel = handle.describe.remote(config.decode_options()).result(timeout_s=_ANSWER_WITHIN_S)
    return model


def _running(name: str) -> dict[str, Any]:
    """The deployments, by name, of the application. Raises `ConfigError` where it does not run."""
    from ray import serve

    applications = serve.status().applications
    if name not in applications:
        raise ConfigError(f"serve.app {name!r}: no such application on this cluster; there: {_listed(applications)}")
    status = applications[name].status
    if status not in ("RUNNING", "DEPLOYING", "UNHEALTHY"):  # the last also while a replica is being replaced
        raise ConfigError(f"serve.app {name!r} is {status}: {applications[name].message.strip()[:300]}")
    deployments: dict[str, Any] = applications[name].deployments
    return deployments


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"


@contextmanager
def plain_serve_errors() -> Iterator[None]:
    """Our own errors as they were raised in the replica, without the traceback that Ray puts around them."""
    from ray.exceptions import ActorDiedError, RayTaskError
    from ray.serve.exceptions import DeploymentUnavailableError

    try:
        yield
    except DeploymentUnavailableError as error:
        raise ApplicationError(error.message) from None
    except TimeoutError:
        raise ConfigError(f"the application did not answer within {_ANSWER_WITHIN_S:.0f} s") from None
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, MurmurError):
            raise type(cause)(str(cause).partition("\n")[0]) from None
        if isinstance(cause, ActorDiedError):
            raise cause from None
        raise
