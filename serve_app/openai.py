"""OpenAI's routes: transcriptions, translations and the list of models, under `/v1` and `/v1/openai`.

    https://platform.openai.com/docs/api-reference/audio

Five formats, times of segments and words, and server-sent events: each segment is sent when it is decided.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from pipeline.engine import Heard
from pipeline.errors import MurmurError
from pipeline.formats import FORMATS, MEDIA_TYPES, verbose
from pipeline.types import DecodeOptions, Segment, Transcript, seconds
from serve_app.bodies import Body
from serve_app.context import Context, request_context
from serve_app.errors import FieldError, answer
from serve_app.native import check_language
from serve_app.schemas import (
    ModelCard,
    ModelList,
    OpenAIForm,
    OpenAIRefusal,
    Transcription,
    VerboseTranscription,
    checked,
)
from serve_app.serving import Model, next_told

router = APIRouter()
PREFIXES = ("/v1", "/v1/openai")
GRANULARITIES = ("timestamp_granularities[]", "timestamp_granularities")
UNSUPPORTED = {  # what would change an answer, and cannot: nobody is to believe that it did
    "include": "log probabilities of tokens are not given",
    "chunking_strategy": "the server cuts by its own rules: auto",
}
PING_S = 15.0  # a stream without segments says that it lives; proxies cut off what is silent
Level = Literal["segment", "word"]

_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": OpenAIRefusal} for status in (400, 401, 404, 408, 413, 415, 429, 503)
}


def _body() -> dict[str, Any]:
    schema = OpenAIForm.model_json_schema()
    levels = {"type": "array", "items": {"type": "string", "enum": ["segment", "word"]}}
    more = {"file": {"type": "string", "format": "binary"}, **schema["properties"], GRANULARITIES[0]: levels}
    schema |= {"properties": more, "required": ["file"]}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def _answers() -> dict[int | str, dict[str, Any]]:
    texts = ("text/plain", "application/x-subrip", "text/vtt")
    kinds: dict[str, Any] = {kind: {"schema": {"type": "string"}} for kind in texts}
    kinds["text/event-stream"] = {"schema": {}}  # of an event to some readers, of the text to others
    return {200: {"model": VerboseTranscription | Transcription, "content": kinds}, **_REFUSALS}


for _prefix in PREFIXES:
    _name = _prefix.strip("/").replace("/", "_")

    @router.post(
        f"{_prefix}/audio/transcriptions",
        openapi_extra=_body(),
        responses=_answers(),
        response_model=None,
        operation_id=f"{_name}_transcriptions",
        tags=["openai"],
    )
    async def transcriptions(request: Request) -> Response:
        """The audio's text, in the language that is spoken."""
        return await _respond(request, "transcribe")

    @router.post(
        f"{_prefix}/audio/translations",
        openapi_extra=_body(),
        responses=_answers(),
        response_model=None,
        operation_id=f"{_name}_translations",
        tags=["openai"],
    )
    async def translations(request: Request) -> Response:
        """The audio's text in English."""
        return await _respond(request, "translate")

    @router.get(
        f"{_prefix}/models", responses={401: {"model": OpenAIRefusal}}, operation_id=f"{_name}_models", tags=["openai"]
    )
    async def models(request: Request) -> ModelList:
        """The models that are served."""
        return _list(request_context(request))


@router.get("/models/list", responses={401: {"model": OpenAIRefusal}}, operation_id="models_list", tags=["openai"])
async def models_list(request: Request) -> ModelList:
    """As `/v1/models`."""
    return _list(request_context(request))


def _list(context: Context) -> ModelList:
    return ModelList(data=[_card(model) for model in context.app.models])


def _card(model: Model) -> ModelCard:
    languages: Sequence[str] = ()
    with suppress(MurmurError):
        languages = model.info.languages
    return ModelCard(id=model.id, created=int(_STARTED), owned_by=model.id.rpartition("/")[0] or "murmuration",
                     languages=list(languages))  # fmt: skip


_STARTED = time.time()


@dataclasses.dataclass(frozen=True, slots=True)
class Ask:
    """What one request asks for."""

    task: Literal["transcribe", "translate"]
    model: Model
    form: OpenAIForm
    levels: tuple[Level, ...]
    options: DecodeOptions


async def _respond(request: Request, task: Literal["transcribe", "translate"]) -> Response:
    context = request_context(request)
    async with AsyncExitStack() as stack:
        body = await stack.enter_async_context(context.body(request))
        audio = body.one_audio("file")
        ask = _ask(context, body, task)
        known = ("file", *OpenAIForm.model_fields, *GRANULARITIES)
        headers = context.ignored([*body.others(*known), *request.query_params.keys()])
        if ask.form.stream:
            ticket = stack.enter_context(context.gate.admitted())
            rest = stack.pop_all()

            async def run(heard: Heard) -> Transcript:
                async with rest:  # given back when all is decided: nobody waits for one who reads slowly
                    return await context.run(request, ticket, ask.model, ask.options, audio, heard)

            return Events(_events(run, ask), rest, headers)
        transcript = await context.transcribe(request, ask.model, ask.options, audio)
    if ask.form.response_format in ("json", "verbose_json"):
        return JSONResponse(_object(transcript, ask), headers=headers)
    format = "txt" if ask.form.response_format == "text" else ask.form.response_format
    text = transcript.text + "\n" if format == "txt" else FORMATS[format](transcript)
    return Response(text, media_type=MEDIA_TYPES[format], headers=headers)


def _ask(context: Context, body: Body, task: Literal["transcribe", "translate"]) -> Ask:
    """Raises `FieldError`, `ModelNotFoundError`."""
    for name in body.fields:
        base = name.partition("[")[0]
        if base in UNSUPPORTED and name not in OpenAIForm.model_fields:
            raise FieldError(base, UNSUPPORTED[base], "unsupported")
    form = checked(OpenAIForm, body.single(tuple(OpenAIForm.model_fields)))
    model = context.app.find_openai(form.model)
    levels = _levels(body, form)
    check_language(form.language, model)
    options = model.config.decode_options()
    options = dataclasses.replace(
        options,
        task=task,
        initial_prompt=form.prompt or options.initial_prompt,
        temperature=form.temperature if "temperature" in form.model_fields_set else options.temperature,
        language=form.language or options.language,
        word_timestamps="word" in levels,
    )
    return Ask(task, model, form, levels, options)


def _levels(body: Body, form: OpenAIForm) -> tuple[Level, ...]:
    """What times are asked for. Raises `FieldError`."""
    sent = [value for name in GRANULARITIES for value in body.fields.get(name, ())]
    sent = [one for value in sent for one in (value if isinstance(value, list) else [value])]
    wrong = next((value for value in sent if value not in ("segment", "word")), None)
    if wrong is not None:
        raise FieldError(GRANULARITIES[0], f"{str(wrong)[:40]!r} is neither 'segment' nor 'word'")
    if sent and form.response_format != "verbose_json":
        raise FieldError(GRANULARITIES[0], "only with response_format verbose_json")
    if form.stream and form.response_format in ("srt", "vtt"):
        raise FieldError("stream", f"not with response_format {form.response_format}: json, text or verbose_json")
    levels: tuple[Level, ...] = tuple(level for level in ("segment", "word") if level in sent)
    return levels or ("segment",)


def _object(transcript: Transcript, ask: Ask) -> dict[str, Any]:
    """The answer in `json` or `verbose_json`."""
    usage = {"type": "duration", "seconds": math.ceil(seconds(transcript.duration))}
    if ask.form.response_format != "verbose_json":
        return {"text": transcript.text, "usage": usage}
    said = verbose(transcript, ask.task)
    code = transcript.language or ask.form.language
    said |= {"language": LANGUAGES[code] if code else "", "usage": usage}
    said["words"] = [{name: word[name] for name in ("word", "start", "end")} for word in said["words"]]
    for level in ("segment", "word"):
        if level not in ask.levels:
            del said[f"{level}s"]
    return said


class Events(StreamingResponse):
    """Server-sent events; when they end, what the request holds is given back, also where none was ever sent."""

    def __init__(self, events: AsyncIterator[str], held: AsyncExitStack, headers: Mapping[str, str]) -> None:
        own = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers={**headers, **own})
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            await super().__call__(scope, receive, send)


async def _events(run: Callable[[Any], Coroutine[Any, Any, Transcript]], ask: Ask) -> AsyncIterator[str]:
    """Each segment as it is decided, then the whole; an error in the middle is the last event."""
    queue: asyncio.Queue[Sequence[Segment]] = asyncio.Queue()
    running = asyncio.create_task(run(queue.put_nowait))
    text, number = Joined(), 0
    try:
        while not (running.done() and queue.empty()):
            segments = await next_told(queue, running, PING_S)
            for segment in segments:
                for event in _segment_events(segment, number, text, ask):
                    yield event
                number += 1
            if not segments and not running.done():
                yield ": ping\n\n"
        yield _event({"type": "transcript.text.done", **_object(await running, ask)})
    except MurmurError as error:
        yield _event(answer(error, openai=True).body)
    except ClientDisconnect:
        pass
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def _segment_events(segment: Segment, number: int, text: Joined, ask: Ask) -> list[str]:
    delta = {"type": "transcript.text.delta", "delta": text.add(segment.text)}
    events: list[dict[str, Any]] = [delta] if delta["delta"] else []
    if ask.form.response_format == "verbose_json":
        of_segment = {"id": number, "start": segment.start, "end": segment.end, "text": segment.text.strip()}
        events.append({"type": "transcript.text.segment", **of_segment})
    return [_event(event) for event in events]


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


class Joined:
    """The text so far, in pieces that together are the stripped whole."""

    def __init__(self) -> None:
        self._begun, self._held = False, ""

    def add(self, text: str) -> str:
        """The next piece: without the space that the whole begins with, and with what the last one ended in."""
        text = self._held + text
        if not self._begun:
            text = text.lstrip()
        piece = text.rstrip()
        self._begun = self._begun or bool(piece)
        self._held = text[len(piece) :]
        return piece
