"""One frozen tree of settings: defaults < the model's own < YAML file < environment < command line.

Unknown keys are refused with the nearest known one. `fingerprint_keys` are the settings that can change a
result; the rest (pools, timeouts, ports) may differ between two runs into one output. This module knows what a
setting means, not what is done with it; it imports pydantic and nothing heavy.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.errors import ConfigError
from pipeline.types import LANGUAGE, Algorithm, DecodeOptions, Task

ENV_PREFIX = "MURMUR_"
# Environment variables with our prefix that are not settings of this tree (`design.md` 7; tests' own switches).
ENV_ELSEWHERE = {"MURMUR_API_TOKENS", "MURMUR_WEBHOOK_SECRET", "MURMUR_FAIL_WITHOUT_GPU"}

FaultStage = Literal["decode", "engine", "sink"]
FaultKind = Literal["raise", "hang", "exit", "oom", "loop", "nan", "empty", "text"]


FAULT_KINDS: dict[FaultStage, tuple[FaultKind, ...]] = {
    "decode": ("raise", "hang", "exit", "oom", "empty"),
    "engine": ("raise", "hang", "exit", "oom", "loop", "nan", "empty", "text"),
    "sink": ("raise", "hang", "exit"),
}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)


class Fault(_Frozen):
    """One fault that the fake engine injects: into whom, where, what, and how many times."""

    match: str = Field("*", description="glob on the recording id")
    stage: FaultStage = "engine"
    kind: FaultKind = "raise"
    times: Annotated[int, Field(ge=1)] | None = Field(None, description="how often per recording; null: always")
    text: str = Field("", description="text: the transcript; raise, oom, nan: the message; hang: seconds, else 3600")

    @model_validator(mode="after")
    def _possible(self) -> Fault:
        if self.kind not in FAULT_KINDS[self.stage]:
            raise ValueError(f"kind {self.kind!r} cannot happen at stage {self.stage!r}")
        return self


class FakeConfig(_Frozen):
    faults: tuple[Fault, ...] = ()


class RayConfig(_Frozen):
    """Where and how the job's Ray cluster is found. None of it can change a result."""

    address: str | None = Field(None, description="null: join the cluster this process runs in, else start one here")
    num_cpus: Annotated[int, Field(ge=1)] | None = Field(None, description="logical CPUs of a cluster started here")
    object_store_mb: Annotated[int, Field(ge=80)] | None = None


class PoolConfig(_Frozen):
    """Sizes of the job's pools. Null means: derived from the cluster's resources, and printed."""

    decode_tasks: Annotated[int, Field(ge=1)] | None = None
    engines: Annotated[int, Field(ge=1)] | None = None
    engine_cpus: Annotated[float, Field(gt=0)] | None = None
    engine_gpus: Annotated[float, Field(ge=0)] | None = None
    units_per_call: Annotated[int, Field(ge=1, le=64)] | None = None
    calls_per_engine: Annotated[int, Field(ge=1, le=64)] | None = None
    shards: Annotated[int, Field(ge=1, le=4096)] | None = Field(None, description="result files per table")


class ServeConfig(_Frozen):
    """The running application that does the decoding where `engine: serve`; its cluster is `ray.address`."""

    app: str = Field("murmuration", description="the application's name")


class LimitsConfig(_Frozen):
    """What a request over HTTP may take. Windows are encoder windows; null: from the engines' lanes."""

    body_mb: Annotated[int, Field(ge=1)] = 100
    audio_s: Annotated[int, Field(ge=1)] = Field(14_400, description="seconds of audio of one request")
    deadline_s: Annotated[float, Field(gt=0)] = Field(600.0, description="of a request; its audio's length is added")
    in_flight_windows: Annotated[int, Field(ge=1)] | None = Field(None, description="in the engines at once")
    queued_windows: Annotated[int, Field(ge=0)] | None = Field(None, description="waiting, before others are refused")
    busy_status: Literal[429, 503] = Field(503, description="of what is refused for want of room")


class WebhookConfig(_Frozen):
    """Who may be called, and where what is to be delivered lies meanwhile."""

    allow: tuple[str, ...] = Field((), description="besides public https: host, network, or origin (also http)")
    spool: str | None = Field(None, description="folder; null: under the user's state folder")
    spool_mb: Annotated[int, Field(ge=1)] = 2048


class Config(_Frozen):
    """Every setting of a run, as in the design's table of keys."""

    model: str = Field("openai/whisper-base", description="hub id, folder, fsspec URI, or demo")
    revision: str | None = Field(None, description="pins a hub model to a commit")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    engine: Literal["local", "serve", "fake"] = Field(
        "local", description="serve: a running application's, whose device and lanes are its own; fake: no model"
    )
    lanes: Annotated[int, Field(ge=1, le=4096)] | None = Field(None, description="null: from free memory")
    fake: FakeConfig = FakeConfig()

    algorithm: Algorithm = "windows"
    chunk_length_s: Annotated[int, Field(ge=1, le=30)] = 30
    chunk_level: Literal["segment", "word"] = "segment"
    unit_length_s: Annotated[int, Field(ge=30, le=1800)] = 300
    sequential_max_s: Annotated[int, Field(ge=60, le=14400)] = 7200

    task: Task = "transcribe"
    language: str | None = Field(None, description="null: detected per recording; window: per window; or a code")
    initial_prompt: str | None = None
    carry_initial_prompt: bool = False
    temperature: Annotated[float, Field(ge=0, le=1)] = 0.0
    temperature_fallback: bool = True
    best_of: Annotated[int, Field(ge=1, le=16)] | None = Field(None, description="candidates above temperature 0")
    beam_size: Annotated[int, Field(ge=1, le=16)] | None = Field(None, description="beam search at temperature 0")
    patience: Annotated[float, Field(gt=0, le=4)] | None = Field(None, description="with beam_size")
    length_penalty: Annotated[float, Field(ge=0, le=1)] | None = None
    hotwords: str | None = Field(None, description="names and terms that stand before every window's prompt")
    compression_ratio_threshold: float | None = 2.4
    logprob_threshold: float | None = -1.0
    no_speech_threshold: float | None = 0.6
    hallucination_silence_threshold: Annotated[float, Field(gt=0)] | None = Field(
        None, description="seconds; sequential with chunk_level word only"
    )
    condition_on_previous_text: bool = Field(True, description="sequential only")
    suppress_tokens: tuple[int, ...] = (-1,)
    max_tokens: Annotated[int, Field(ge=1, le=224)] | None = None

    vad: Literal["silero", "none"] = "silero"
    channels: Literal["mix", "split"] = "mix"

    log_format: Literal["text", "json"] = Field("text", description="of log lines: for a person or for a program")
    max_failed_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_audio_s: Annotated[int, Field(ge=1)] = 172_800
    decode_timeout_s: Annotated[int, Field(ge=1)] | None = Field(
        None, description="a decoder's time for one file; null: a minute and a tenth of the audio decoded so far"
    )
    decode_memory_mb: Annotated[int, Field(ge=200)] = Field(1500, description="a decoder's, on top of its idle 45 MB")
    engine_timeout_s: Annotated[int, Field(ge=1)] = Field(
        600, description="an engine that has work and stands still for so long is started again"
    )

    ray: RayConfig = RayConfig()
    serve: ServeConfig = ServeConfig()
    pool: PoolConfig = PoolConfig()

    host: str = Field("127.0.0.1", description="what `murmur serve` listens on; others need tokens")
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    ui: bool = Field(True, description="the page at /")
    tokens_file: str | None = Field(None, description="who may call, one token a line; read again when it changes")
    limits: LimitsConfig = LimitsConfig()
    webhook: WebhookConfig = WebhookConfig()
    price_per_minute: Annotated[float, Field(ge=0)] = Field(0.0, description="of audio, for `cost` in answers")
    canary_s: Annotated[float, Field(gt=0)] = Field(30.0, description="an idle engine decodes a window this often")

    @field_validator("language", mode="before")
    @classmethod
    def _norwegian(cls, value: Any) -> Any:
        """YAML reads `no`, the code of Norwegian, as false. Elsewhere, too, `DE` is `de`."""
        return "no" if value is False else value.strip().lower() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _agree(self) -> Config:
        if self.language is not None and not LANGUAGE.fullmatch(self.language):
            raise ValueError(f"language: {self.language!r} is not a code such as 'en', nor 'window'")
        return self

    def decode_options(self) -> DecodeOptions:
        """The options every recording has unless its manifest line says otherwise."""
        return DecodeOptions(
            algorithm=self.algorithm,
            chunk_length_s=self.chunk_length_s,
            task=self.task,
            language=self.language,
            initial_prompt=self.initial_prompt,
            carry_initial_prompt=self.carry_initial_prompt,
            temperature=self.temperature,
            temperature_fallback=self.temperature_fallback,
            best_of=self.best_of,
            beam_size=self.beam_size,
            patience=self.patience,
            length_penalty=self.length_penalty,
            hotwords=self.hotwords,
            hallucination_silence_threshold=self.hallucination_silence_threshold,
            compression_ratio_threshold=self.compression_ratio_threshold,
            logprob_threshold=self.logprob_threshold,
            no_speech_threshold=self.no_speech_threshold,
            condition_on_previous_text=self.condition_on_previous_text,
            suppress_tokens=self.suppress_tokens,
            max_tokens=self.max_tokens,
            word_timestamps=self.chunk_level == "word",
        )


SERVER_KEYS = ("host", "port", "ui", "tokens_file", "limits", "webhook", "price_per_minute", "canary_s")
# What no result depends on. `dtype` and `model` are fingerprinted as resolved, by the caller.
_NOT_IN_FINGERPRINT = frozenset(
    "device engine lanes log_format max_failed_fraction decode_timeout_s decode_memory_mb engine_timeout_s ray"
    " serve pool".split()
).union(SERVER_KEYS)

# A model may bring its own defaults; the user's settings win.
MODEL_DEFAULTS: dict[str, dict[str, Any]] = {
    "demo": {"chunk_length_s": 10, "condition_on_previous_text": False},
}


def fingerprint_keys(config: Config) -> dict[str, Any]:
    """The settings that can change a result, as plain JSON values (engine `fake` counts: it changes everything)."""
    keys = {k: v for k, v in config.model_dump(mode="json").items() if k not in _NOT_IN_FINGERPRINT}
    if config.engine != "fake":
        keys.pop("fake")
    return keys | {"fake_engine": config.engine == "fake"}


def fingerprint(keys: Mapping[str, Any]) -> str:
    """A short stable name of these settings: 16 hex digits."""
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:16]


def load_config(
    file: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    base: Mapping[str, Any] | None = None,
) -> Config:
    """The settings of a run.

    `base` are settings below all others, those that an output was begun with.
    `overrides` are command-line options by key (dotted keys allowed), `sets` are `key=value` texts (the value is
    YAML), `env` is the environment (`MURMUR_POOL__ENGINES=2` is `pool.engines: 2`). Raises `ConfigError`.
    """
    layers = [
        dict(base or {}),
        _read_file(file) if file is not None else {},
        _from_env(os.environ if env is None else env),
        _nest(dict(_parse_set(text) for text in sets)),
        _nest({k: v for k, v in (overrides or {}).items() if v is not None}),
    ]
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(merged, layer)
    merged = _merge(MODEL_DEFAULTS.get(str(merged.get("model")), {}), merged)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every key with dots: `model`, `pool.engines`, ..."""
    for name, info in model.model_fields.items():
        yield prefix + name
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from known_keys(info.annotation, f"{prefix}{name}.")


def _read_file(file: str | Path) -> dict[str, Any]:
    try:
        text = Path(file).read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"config file {file}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {file} is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"config file {file}: expected keys and values, found {type(values).__name__}")
    return _nest({str(k): v for k, v in values.items()})


def _from_env(env: Mapping[str, str]) -> dict[str, Any]:
    flat = {
        name.removeprefix(ENV_PREFIX).lower().replace("__", "."): _yaml_value(name, text)
        for name, text in env.items()
        if name.startswith(ENV_PREFIX) and name not in ENV_ELSEWHERE
    }
    return _nest(flat)


def _parse_set(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {text!r}: expected key=value")
    return key.strip(), _yaml_value(f"--set {key.strip()}", value)


def _yaml_value(where: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{where}: {text!r} is not a YAML value") from None


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"pool.engines": 2} → {"pool": {"engines": 2}}"""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        nested = _merge(nested, value)
    return nested


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _explain(error: ValidationError) -> str:
    """One line for every key that is wrong, with the nearest known key for an unknown one."""
    known = list(known_keys())
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, known, n=1)
            lines.append(f"unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        else:
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{key}: {message} (got {problem['input']!r})" if key else message)
    return "; ".join(lines)
