"""The application on Ray Serve: the engines of each model are a deployment; `build_app` puts them together.

    serve run configs/serve.yaml          the applications of a file, `import_path: serve_app.deployment:build_app`
    engine: serve                         the job's Units come to these same engines (`pipeline.served`)

A replica owns one engine, whose lanes the windows of all callers share: nothing is batched by Serve. It is ready when
a window has been decoded, and healthy while it moves: busy, something in flight comes further; idle, a window is
decoded now and then. Knows neither HTTP nor what a request is.
"""

# No `from __future__ import annotations`: Serve checks an application's `args` by the type that `build_app` names.
import asyncio
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from pipeline.config import FakeConfig
from pipeline.engine import EngineConfig, load_engine
from pipeline.engine.checkpoint import model_fingerprint, read_json, resolve_model, revision_of
from pipeline.engine.tokens import Tokenizer, check_options
from pipeline.errors import EngineError
from pipeline.served import ServedModel, deployment_name
from pipeline.types import DecodeOptions, Unit, UnitResult, samples

_MOST_LANES = 256  # of an engine that chooses by its memory
_DRAIN_S = 600.0  # a replica that is to go finishes what it has; a Unit on a slow CPU takes minutes
_HEALTH_EVERY_S, _HEALTH_WITHIN_S = 10.0, 120.0  # a window of a large model on a CPU takes half a minute


class _Args(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelArgs(_Args):
    """One model of the application. Keys are the job's settings, where it has them."""

    model: str = Field("openai/whisper-base", description="hub id, folder, fsspec URI, or demo; also its id")
    revision: str | None = None
    engine: Literal["local", "fake"] = "local"
    device: str = Field("auto", description="auto: cuda where num_gpus says so")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    lanes: Annotated[int, Field(ge=1, le=4096)] | None = None
    fake: FakeConfig = FakeConfig()
    replicas: Annotated[int, Field(ge=1)] = 1
    num_cpus: Annotated[float, Field(ge=0)] = 1.0
    num_gpus: Annotated[float, Field(ge=0)] = 0.0

    def engine_config(self) -> EngineConfig:
        on_gpu = self.num_gpus > 0
        return EngineConfig(
            model=self.model,
            revision=self.revision,
            device=self.device if self.device != "auto" else "cuda" if on_gpu else "cpu",
            dtype=self.dtype,
            lanes=self.lanes,
            threads=None if on_gpu else max(1, int(self.num_cpus)),
            fake_faults=self.fake.faults if self.engine == "fake" else None,
        )


class AppArgs(_Args):
    """The `args` of an application in Serve's configuration file."""

    models: Annotated[tuple[ModelArgs, ...], Field(min_length=1)] = (ModelArgs(),)
    canary_s: Annotated[float, Field(gt=0)] = Field(30.0, description="an idle engine decodes a window this often")
    engine_timeout_s: Annotated[float, Field(gt=0)] = Field(600.0, description="busy and still for so long: unhealthy")

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len({deployment_name(each.model) for each in self.models}) < len(self.models):
            raise ValueError("models: two have one id")
        return self


class EngineReplica:
    """One engine, for whoever holds a handle: the job's stage, the HTTP face."""

    def __init__(self, engine: EngineConfig, canary_s: float, engine_timeout_s: float) -> None:
        self._canary_s, self._timeout_s = canary_s, engine_timeout_s
        self._tokenizer: Tokenizer | None = None
        weights, revision = "fake", engine.revision
        if engine.fake_faults is None:
            folder = resolve_model(engine.model, engine.revision)
            self._tokenizer = Tokenizer.load(folder, read_json(folder, "config.json")["vocab_size"])
            weights, revision = model_fingerprint(folder), revision_of(folder, engine.revision)
        self._engine = load_engine(engine)
        self._model = ServedModel(self._engine.info, weights, revision)
        self._prove()

    async def submit(self, unit: Unit, options: DecodeOptions) -> UnitResult:
        """One Unit, decoded beside those of all other callers. Raises `EngineError` or `ConfigError`, as an engine."""
        result = await self._engine.submit(unit, options)
        self._proven_at = time.monotonic()
        return result

    async def describe(self, options: DecodeOptions) -> ServedModel:
        """What is served here. Raises `ConfigError` for options that it cannot honour."""
        if self._tokenizer is not None:
            check_options(options, self._tokenizer)
        return self._model

    async def check_health(self) -> None:
        """Asked by Serve, which replaces a replica that raises or does not answer."""
        if self._engine.n_windows:
            still_s = self._engine.load().idle_s
            if still_s > self._timeout_s:
                raise EngineError(f"the engine has work and has stood still for {still_s:.0f} s")
        elif time.monotonic() - self._proven_at > self._canary_s:
            await asyncio.to_thread(self._prove)

    def _prove(self) -> None:
        """Decode a second of noise: what is loaded works, and the dispatcher lives."""
        noise = np.random.default_rng(0).integers(-2000, 2000, samples(1.0)).astype(np.int16)
        self._engine.decode([noise], DecodeOptions(language="en", temperature_fallback=False, max_tokens=8))
        self._proven_at = time.monotonic()


class Front:
    """The application's ingress. HTTP is to be its face; so far it says which models there are."""

    def __init__(self, engines: Mapping[str, DeploymentHandle]) -> None:
        self._engines = dict(engines)

    def models(self) -> list[str]:
        return sorted(self._engines)


def build_app(args: AppArgs) -> Application:
    """What Serve runs for these arguments."""
    engines = {each.model: _engines(each, args) for each in args.models}
    front: Application = serve.deployment(Front, name="front", ray_actor_options={"num_cpus": 0}).bind(engines)
    return front


def _engines(model: ModelArgs, args: AppArgs) -> Any:
    """The deployment of one model's engines. Calls never wait in Serve: admission is the callers' and the engine's."""
    deployment = serve.deployment(
        EngineReplica,
        name=deployment_name(model.model),
        num_replicas=model.replicas,
        ray_actor_options={"num_cpus": model.num_cpus, "num_gpus": model.num_gpus},
        max_ongoing_requests=4 * (model.lanes or _MOST_LANES),
        health_check_period_s=_HEALTH_EVERY_S,
        health_check_timeout_s=_HEALTH_WITHIN_S,
        graceful_shutdown_timeout_s=_DRAIN_S,
    )
    return deployment.bind(model.engine_config(), args.canary_s, args.engine_timeout_s)
