"""The application on Ray Serve: an HTTP server, and the engines of each model, a deployment each.

    murmur serve                          on one machine          serve run configs/serve.yaml          on a cluster
    engine: serve                         the job's Units come to these same engines (`pipeline.served`)

A replica of an engine deployment owns one engine, whose lanes the windows of all callers share: nothing is batched by
Serve, and nothing waits in it. It is ready when a window has been decoded, and healthy while it moves: busy, something
in flight comes further; idle, a window is decoded now and then. The deployment `front` runs our own HTTP server
(`server.py`) on a port of its node, and calls the engines through their handles; Serve's proxies are not used. It
decodes audio, and needs CPUs; engines need what their models need.
"""

# No `from __future__ import annotations`: Serve checks an application's `args` by the type that `build_app` names.
import asyncio
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy
from ray.serve.handle import DeploymentHandle

from pipeline import logs
from pipeline.cluster import Cluster
from pipeline.config import SERVER_KEYS, Config, FakeConfig, LimitsConfig, WebhookConfig, load_config
from pipeline.engine import EngineConfig, EngineInfo, Heard, load_engine
from pipeline.engine.checkpoint import model_fingerprint, read_json, resolve_model, revision_of
from pipeline.engine.tokens import Tokenizer, check_options
from pipeline.errors import ConfigError, EngineError
from pipeline.machine import give_way, usable_cores
from pipeline.served import ServedModel, deployment_name, plain_serve_errors
from pipeline.types import DecodeOptions, Segment, Unit, UnitResult
from serve_app.app import create_app
from serve_app.auth import Tokens, refuse_open
from serve_app.errors import NotReadyError
from serve_app.server import HttpServer
from serve_app.serving import Standing, next_told, prove
from serve_app.webhook import WebhookSettings, default_spool

_MOST_LANES = 256  # of an engine that chooses by its memory
_DRAIN_S = 600.0  # a replica that is to go finishes what it has; a Unit on a slow CPU takes minutes
_HEALTH_EVERY_S, _HEALTH_WITHIN_S = 10.0, 120.0  # a window of a large model on a CPU takes half a minute
_DEATHS = 2  # of replicas with one Unit in them, after which it is the Unit that is to blame
_PER_LANE = 1.25  # windows in an engine for each of its lanes, above which another replica is wanted
FRONT = "front"
_LINES = 10_000
_TELL_EVERY_S = 0.2  # what is logged
# Niceness of an engine on a CPU above the server's, which has to answer in milliseconds whatever is computed beside it.
# Between them are the decoders (`pipeline.decoder`). Where Ray was started by others, all have Ray's.
_ENGINES_GIVE_WAY = 10


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
    max_replicas: Annotated[int, Field(ge=1)] | None = Field(None, description="more, as windows are queued")
    num_cpus: Annotated[float, Field(ge=0)] = 1.0
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    settings: dict[str, Any] = Field({}, description="any setting of the job's that says how audio is read and decoded")

    def config(self) -> Config:
        """What a request does not say. Raises `ConfigError` for a setting that is none of a model's."""
        wrong = next((key for key in self.settings if key.partition(".")[0] in _NOT_A_MODELS), None)
        if wrong is not None:
            raise ConfigError(f"models: {self.model}: settings: {wrong} is not a model's; it has a key of its own")
        return load_config(overrides={**self.settings, "model": self.model}, env={})

    def engine_config(self) -> EngineConfig:
        on_gpu = self.num_gpus > 0
        return EngineConfig(
            model=self.model,
            revision=self.revision,
            device=self.device if self.device != "auto" else "cuda" if on_gpu else "cpu",
            dtype=self.dtype,
            lanes=self.lanes,
            threads=None if on_gpu else max(1, min(int(self.num_cpus), usable_cores())),
            fake_faults=self.fake.faults if self.engine == "fake" else None,
        )


_NOT_A_MODELS = frozenset(
    {*SERVER_KEYS, *ModelArgs.model_fields, "ray", "serve", "pool", "max_failed_fraction", "log_format"} - {"settings"}
)


class AppArgs(_Args):
    """The `args` of an application in Serve's configuration file. The server's keys are those of `murmur serve`."""

    models: Annotated[tuple[ModelArgs, ...], Field(min_length=1)] = (ModelArgs(),)
    http: bool = Field(True, description="false: engines only, for jobs with `engine: serve`")
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    ui: bool = True
    tokens_file: str | None = None
    limits: LimitsConfig = LimitsConfig()
    webhook: WebhookConfig = WebhookConfig()
    price_per_minute: Annotated[float, Field(ge=0)] = 0.0
    front_cpus: Annotated[float, Field(ge=0)] = Field(
        1.0, description="logical CPUs of the server, which decodes audio"
    )
    front_resources: dict[str, float] = Field(
        {}, description="of the node that the server is to run on, by Ray's names"
    )
    log_format: Literal["text", "json"] = "text"
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
        if engine.device == "cpu":
            give_way(_ENGINES_GIVE_WAY)
        self._engine = load_engine(engine)
        self._model = ServedModel(self._engine.info, weights, revision)
        self._prove()

    async def submit(self, unit: Unit, options: DecodeOptions, brief: bool = False) -> UnitResult:
        """One Unit, decoded beside those of all other callers. Raises `EngineError` or `ConfigError`, as an engine."""
        result = await self._engine.submit(unit, options, brief=brief)
        self._proven_at = time.monotonic()
        return result

    async def stream(
        self, unit: Unit, options: DecodeOptions, brief: bool = False
    ) -> AsyncIterator[Sequence[Segment] | UnitResult]:
        """As `submit`: segments as they are decided, in the end the result."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Sequence[Segment]]()

        def heard(segments: Sequence[Segment]) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, segments)

        deciding = asyncio.ensure_future(self._engine.submit(unit, options, heard, brief))
        try:
            while not (deciding.done() and queue.empty()):
                if segments := await next_told(queue, deciding):
                    yield segments
            self._proven_at = time.monotonic()
            yield await deciding
        finally:
            deciding.cancel()

    async def standing(self) -> Standing:
        """What the engine is doing."""
        return Standing(self._engine.load(), time.monotonic() - self._proven_at)

    async def record_autoscaling_stats(self) -> dict[str, int]:
        """For `replicas_for_windows`."""
        return {"windows": self._engine.n_windows, "lanes": self._engine.info.lanes}

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
        prove(self._engine)
        self._proven_at = time.monotonic()


def replicas_for_windows(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """How many replicas the windows in the engines call for: one request may be one window or five hundred."""
    metrics = context.aggregated_metrics or {}
    windows, lanes = (metrics.get(name, {}).values() for name in ("windows", "lanes"))
    wanted = math.ceil(sum(windows) / (_PER_LANE * max(lanes, default=1)))
    bounds = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return min(max(wanted, bounds[0], 1), bounds[1]), {}


class ReplicaModel:
    """`serve_app.serving.Model` of a deployment: its engines are behind a handle."""

    def __init__(self, args: ModelArgs, handle: DeploymentHandle) -> None:
        self.id, self.config = args.model, args.config()
        self._handle = handle
        self._model: ServedModel | None = None
        self._replicas, self._scales = args.replicas, (args.max_replicas or 0) > args.replicas

    @property
    def info(self) -> EngineInfo:
        if self._model is None:
            raise NotReadyError(f"{self.id} is being loaded")
        return self._model.info

    @property
    def lanes(self) -> int:
        return self._replicas * (self._model.info.lanes if self._model else 1)

    async def submit(
        self, unit: Unit, options: DecodeOptions, heard: Heard | None = None, brief: bool = False
    ) -> UnitResult:
        """A replica that dies has its Units sent to another; one that kills `_DEATHS` of them is given up."""
        tell, deaths = _Once(heard), 0
        while True:
            try:
                with plain_serve_errors():
                    return await self._asked(unit, options, tell, brief)
            except ActorUnavailableError:
                await asyncio.sleep(0.5)
            except ActorDiedError:
                deaths += 1
                if deaths >= _DEATHS:
                    raise EngineError(f"the engine died {deaths} times with a part of this audio in it") from None
                await asyncio.sleep(0.5)

    async def _asked(self, unit: Unit, options: DecodeOptions, tell: "_Once", brief: bool) -> UnitResult:
        if tell.heard is None:
            response = self._handle.submit.remote(unit, options, brief)
            try:
                result: UnitResult = await response
                return result
            except asyncio.CancelledError:
                response.cancel()
                raise
        stream = self._handle.options(stream=True).stream.remote(unit, options, brief)
        tell.again()
        try:
            async for item in stream:
                if isinstance(item, UnitResult):
                    return item
                tell(item)
        except asyncio.CancelledError:
            stream.cancel()
            raise
        raise EngineError("a stream of segments ended without its result")

    async def standing(self) -> Standing:
        with plain_serve_errors():
            if self._model is None:
                self._model = await self._handle.describe.remote(self.config.decode_options())
            standing: Standing = await self._handle.standing.remote()
            if self._scales:  # and with the replicas the room that there is
                self._replicas = await asyncio.to_thread(_n_running, self._handle)
        return standing


def _n_running(handle: DeploymentHandle) -> int:
    app = serve.status().applications[handle.app_name]
    return max(1, int(app.deployments[handle.deployment_name].replica_states.get("RUNNING", 0)))


class _Once:
    """Tells each segment once, also where a second replica begins the Unit again."""

    def __init__(self, heard: Heard | None) -> None:
        self.heard = heard
        self._told = self._seen = 0

    def again(self) -> None:
        self._seen = 0

    def __call__(self, segments: Sequence[Segment]) -> None:
        assert self.heard is not None
        new = segments[max(0, self._told - self._seen) :]
        self._seen += len(segments)
        self._told = max(self._told, self._seen)
        if new:
            self.heard(new)


class Front:
    """The HTTP server, on a port of this replica's node. It drains when Serve, or `murmur serve`, ends it."""

    def __init__(self, args: AppArgs, engines: Sequence[DeploymentHandle]) -> None:
        logs.set_up(args.log_format)
        models = [ReplicaModel(model, handle) for model, handle in zip(args.models, engines, strict=True)]
        tokens = Tokens.find(args.tokens_file)  # and of this process's environment: arguments lie in Ray's store
        refuse_open(tokens, args.host)
        server = create_app(
            models,
            args.limits,
            tokens=tokens,
            webhooks=webhook_settings(args.webhook),
            price_per_minute=args.price_per_minute,
            canary_s=args.canary_s,
            engine_timeout_s=args.engine_timeout_s,
            ui=args.ui,
        )
        self._is_drained = False
        self._server = HttpServer(server, args.host, args.port, drain_s=args.limits.deadline_s)
        self._server.start()

    def url(self) -> str:
        return self._server.url

    async def lines(self) -> AsyncIterator[list[str]]:
        """What is logged here until it is drained, for who started this on one machine: Ray would put its own words
        before. Many at once, since each of Ray's messages costs as much as a request that is refused. It must end by
        itself: Serve's shutdown waits for it as for any request."""
        lines = deque[str](maxlen=_LINES)  # where nobody reads them, they are in the process's own log
        with logs.also(lines.append):
            while not (self._is_drained and not lines):
                await asyncio.sleep(_TELL_EVERY_S)
                if lines:
                    yield [lines.popleft() for _ in range(len(lines))]

    def why_not_ready(self) -> str | None:
        return self._server.app.why_not_ready()

    async def check_health(self) -> None:
        if not self._server.is_alive:
            raise EngineError("the HTTP server has ended")

    async def drain(self) -> None:
        """Returns when what runs has ended."""
        await asyncio.to_thread(self._server.drain)
        self._is_drained = True

    async def __del__(self) -> None:
        await self.drain()


class Idle:
    """The ingress that Serve wants every application to have, where nobody is to come in."""

    def __init__(self, args: AppArgs, engines: Sequence[DeploymentHandle]) -> None:
        """Its arguments are what makes Serve deploy the engines."""


def webhook_settings(config: WebhookConfig) -> WebhookSettings:
    """With the secret of this process's environment."""
    spool = Path(config.spool).expanduser() if config.spool else default_spool()
    return WebhookSettings(config.allow, spool, config.spool_mb, os.environ.get("MURMUR_WEBHOOK_SECRET"))


def build_app(args: AppArgs) -> Application:
    """What Serve runs for these arguments. Raises `ConfigError`."""
    for each in args.models:
        each.config()
    engines = [_engines(each, args) for each in args.models]
    deployment = serve.deployment(
        Front,
        name=FRONT,
        ray_actor_options={"num_cpus": args.front_cpus, "resources": args.front_resources},
        max_ongoing_requests=100,
        graceful_shutdown_timeout_s=args.limits.deadline_s + 20,
    ) if args.http else serve.deployment(Idle, name=FRONT, ray_actor_options={"num_cpus": 0})  # fmt: skip
    app: Application = deployment.bind(args, engines)
    return app


def _engines(model: ModelArgs, args: AppArgs) -> Any:
    """The deployment of one model's engines. Calls never wait in Serve: admission is the callers' and the engine's."""
    scaling: dict[str, Any] = {"num_replicas": model.replicas}
    if model.max_replicas is not None and model.max_replicas > model.replicas:
        policy = AutoscalingPolicy(policy_function="serve_app.deployment:replicas_for_windows")
        bounds = {"min_replicas": model.replicas, "max_replicas": model.max_replicas}
        scaling = {"autoscaling_config": AutoscalingConfig(**bounds, policy=policy)}
    deployment = serve.deployment(
        EngineReplica,
        name=deployment_name(model.model),
        ray_actor_options={"num_cpus": model.num_cpus, "num_gpus": model.num_gpus},
        max_ongoing_requests=4 * (model.lanes or _MOST_LANES),
        health_check_period_s=_HEALTH_EVERY_S,
        health_check_timeout_s=_HEALTH_WITHIN_S,
        graceful_shutdown_timeout_s=_DRAIN_S,
        **scaling,
    )
    return deployment.bind(model.engine_config(), args.canary_s, args.engine_timeout_s)


# ---- on one machine: `murmur serve`


def serve_here(configs: Sequence[Config], say: Callable[[str], None], verbose: bool = False) -> NoReturn:
    """Serve these models (one config each) until a signal comes, and then drain. Server's keys are the first one's.

    Raises `ConfigError` and `ModelError` before anything is started.
    """
    refuse_open(Tokens.find(configs[0].tokens_file), configs[0].host)
    for config in configs:
        _refuse_unknown(config)
    if not verbose:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # how it starts, in its own words
    with Cluster(configs[0].ray, niceness=0) as cluster:  # its clients may well be on this machine, and wait
        nodes = cluster.nodes()
        args = args_for(configs, sum(node.cpus for node in nodes), sum(node.gpus for node in nodes))
        name = configs[0].serve.app
        serve.start(proxy_location="Disabled", logging_config={"log_level": "INFO" if verbose else "ERROR"})
        try:
            _serve_until_stopped(args, name, say)
        finally:
            serve.shutdown()


def _serve_until_stopped(args: AppArgs, name: str, say: Callable[[str], None]) -> NoReturn:
    say(f"loading {', '.join(model.model for model in args.models)}")
    front = serve.run(build_app(args), name=name, route_prefix=None)
    reading = threading.Thread(target=_forward, args=(front, say), name="lines", daemon=True)
    reading.start()
    try:
        say(f"listening on {front.url.remote().result()}")
        while (reason := front.why_not_ready.remote().result()) is not None:
            time.sleep(0.2)
            if (app := serve.status().applications[name]).status == "DEPLOY_FAILED":
                raise EngineError(f"the application did not start: {app.message.strip()[:500] or reason}")
        say("ready")
        while True:
            time.sleep(3600)
    except BaseException:
        say("draining: what runs is finished, nothing new is taken; a second signal ends it at once")
        front.drain.remote().result(timeout_s=args.limits.deadline_s + 20)
        raise


def _forward(front: DeploymentHandle, say: Callable[[str], None]) -> None:
    """What the server logs, until it is no more."""
    with suppress(Exception):
        for lines in front.options(stream=True).lines.remote():
            for line in lines:
                say(line)


def _refuse_unknown(config: Config) -> None:
    if config.engine == "fake":
        return
    if config.engine == "serve":
        raise ConfigError("engine: serve is a job's; this is what it calls")
    folder = resolve_model(config.model, config.revision)
    check_options(config.decode_options(), Tokenizer.load(folder, read_json(folder, "config.json")["vocab_size"]))


def args_for(configs: Sequence[Config], cpus: float, gpus: float) -> AppArgs:
    """The application's arguments for one machine with so many logical CPUs and GPUs: `pool.engines` of each model, a
    GPU each where there are enough, else the CPUs in equal parts, but for one, which is the server's.

    One engine with all cores answers one request soonest; several of one core each carry more of them where others
    want the cores too, since threads of one engine wait for the one that was interrupted (0.56 of its speed alone
    beside server, decoders and Ray on 2 cores).
    """
    first, pool = configs[0], configs[0].pool
    each = pool.engines or 1
    on_gpu = gpus >= len(configs) * each * (pool.engine_gpus or 1) and all(config.device != "cpu" for config in configs)
    share = {"num_cpus": pool.engine_cpus or (1.0 if on_gpu else max(1.0, (cpus - 1) // (len(configs) * each)))}
    share |= {"num_gpus": (1.0 if pool.engine_gpus is None else pool.engine_gpus) if on_gpu else 0.0, "replicas": each}
    models = tuple(
        ModelArgs.model_validate(
            {
                name: getattr(config, name)
                for name in ("model", "revision", "engine", "device", "dtype", "lanes", "fake")
            }
            | share
            | {"settings": _settings_of(config)}
        )
        for config in configs
    )
    own = {name: getattr(first, name) for name in (*SERVER_KEYS, "log_format", "engine_timeout_s")}
    return AppArgs(models=models, **own)


def _settings_of(config: Config) -> dict[str, Any]:
    said = config.model_dump(mode="json", exclude_unset=True)
    return {key: value for key, value in said.items() if key not in _NOT_A_MODELS and key != "engine_timeout_s"}
