"""What goes in and out over HTTP, as pydantic models: they check the fields, and are the OpenAPI description.

DeepInfra's names on the native route, OpenAI's on the others. Knows no engine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from serve_app.errors import FieldError

Form = TypeVar("Form", bound="_Form")
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def _unquoted(value: Any) -> Any:
    """DeepInfra's SDK for Node writes text fields as JSON, with quotes around them."""
    if isinstance(value, str) and len(value) > 1 and value[0] == value[-1] == '"':
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _number(value: Any) -> Any:
    """JSON's `true` is no number, whatever Python thinks."""
    if isinstance(value, bool):
        raise ValueError("a number is wanted")
    return value


def _whole(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(r"\s*[+-]?[0-9]+\s*", value):
        raise ValueError("a whole number is wanted")
    return _number(value)


def _text(value: Any) -> Any:
    """Without control characters, which no transcript has; empty is as good as not sent."""
    value = _unquoted(value)
    return (_CONTROLS.sub(" ", value).strip() or None) if isinstance(value, str) else value


def _language(value: Any) -> Any:
    value = _unquoted(value)
    if not isinstance(value, str):
        return value
    code = value.strip().lower()
    if code and code not in LANGUAGES:
        raise ValueError(f"{value[:40]!r} is none of the codes: {', '.join(sorted(LANGUAGES))}")
    return code or None


_Choice = BeforeValidator(_unquoted)
Text = Annotated[Annotated[str, Field(max_length=20_000)] | None, BeforeValidator(_text)]
Language = Annotated[str | None, BeforeValidator(_language)]
Temperature = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), BeforeValidator(_number)]


class _Form(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NativeForm(_Form):
    """The fields of the native route, but for the audio."""

    task: Annotated[Literal["transcribe", "translate"], _Choice] = Field(
        "transcribe", description="translate: into English"
    )
    initial_prompt: Text = Field(None, description="prompt for the first window only")
    temperature: Temperature = Field(0.0, description="0: with fallback to higher ones where a decode looks wrong")
    language: Language = Field(None, description="code of what is spoken; detected where absent")
    chunk_level: Annotated[Literal["segment", "word"], _Choice] = Field("segment", description="word: with word times")
    chunk_length_s: Annotated[int, Field(ge=1, le=30), BeforeValidator(_whole)] | None = Field(
        None, description="length of the windows, seconds; where absent the model's own, 30 for most"
    )
    webhook: Text = Field(None, description="address to call when it is done; the answer then only says `queued`")


class OpenAIForm(_Form):
    """The fields of the compatible routes, but for the file."""

    model: Text = Field(None, description="id of a served model, or `whisper-1` for the first of them")
    language: Language = Field(None, description="code of what is spoken; detected where absent")
    prompt: Text = Field(None, description="prompt for the first window only")
    temperature: Temperature = 0.0
    response_format: Annotated[Literal["json", "text", "srt", "verbose_json", "vtt"], _Choice] = "json"
    stream: bool = Field(False, description="server-sent events; with json, text or verbose_json")
    chunking_strategy: Annotated[Literal["auto"] | None, _Choice] = Field(
        None, description="the server cuts where nobody speaks, also without this"
    )


def checked(form: type[Form], fields: Mapping[str, Any]) -> Form:
    """The form with these fields. Raises `FieldError` for the first that is wrong."""
    try:
        return form.model_validate(fields)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        name = str(problem["loc"][0]) if problem["loc"] else "body"
        raise FieldError(name, problem["msg"].removeprefix("Value error, "), problem["type"]) from None


# ---- answers of the native route


class NativeSegment(BaseModel):
    id: int
    start: float = Field(description="seconds")
    end: float = Field(description="seconds")
    text: str


class NativeWord(BaseModel):
    text: str
    start: float
    end: float


class InferenceStatus(BaseModel):
    status: Literal["unknown", "queued", "running", "succeeded", "failed"]
    runtime_ms: int = Field(description="from the request's arrival to its answer")
    cost: float = Field(description="`price_per_minute` times the audio's minutes")
    tokens_generated: int
    tokens_input: int


class Queued(BaseModel):
    """What a request with a webhook is answered."""

    request_id: str
    inference_status: InferenceStatus


class NativeAnswer(Queued):
    """What a request is answered, or its webhook is sent."""

    text: str
    segments: list[NativeSegment]
    language: str = Field(description="code of what is spoken; empty where nobody speaks and none was named")
    input_length_ms: int
    words: list[NativeWord] = Field(description="empty unless chunk_level is word")
    duration: float = Field(description="seconds of audio that were decoded")


class Detail(BaseModel):
    loc: list[str | int]
    msg: str
    type: str


class Refusal(BaseModel):
    """An error of the native route."""

    detail: str | list[Detail]


# ---- answers of the compatible routes


class Usage(BaseModel):
    type: Literal["duration"] = "duration"
    seconds: int = Field(description="of audio, rounded up")


class Transcription(BaseModel):
    text: str
    usage: Usage


class VerboseSegment(BaseModel):
    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float


class VerboseWord(BaseModel):
    word: str
    start: float
    end: float


class VerboseTranscription(Transcription):
    task: Literal["transcribe", "translate"]
    language: str = Field(description="English name of what is spoken")
    duration: float
    segments: list[VerboseSegment] | None = None
    words: list[VerboseWord] | None = None


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIRefusal(BaseModel):
    """An error of the compatible routes."""

    error: ErrorObject


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    languages: list[str] = Field(description="codes that it can be asked for; empty: English only, or not loaded yet")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
