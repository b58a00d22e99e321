"""DeepInfra's route: `POST /v1/inference/{model}`, one file, one answer, or a webhook later.

https://deepinfra.com/openai/whisper-base/api
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from pipeline.types import DecodeOptions, Transcript, seconds
from serve_app.context import Context, request_context
from serve_app.errors import FieldError, RefusedError
from serve_app.limits import BusyError
from serve_app.schemas import (
    InferenceStatus,
    NativeAnswer,
    NativeForm,
    NativeSegment,
    NativeWord,
    Queued,
    Refusal,
    checked,
)
from serve_app.serving import Model
from serve_app.webhook import SpoolFullError, WebhookRefusedError

router = APIRouter()
_FIELDS = tuple(NativeForm.model_fields)
_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Refusal, "description": why}
    for status, why in {
        400: "what was sent is not audio, or not a form",
        401: "no token, or one that is not known",
        404: "no such model",
        408: "the body came too slowly",
        413: "too many bytes, or too many seconds of audio",
        415: "neither multipart/form-data nor application/json",
        422: "a field is missing, repeated or out of its range",
        429: "busy, where it is set so: see Retry-After",
        503: "busy, not ready or over the deadline: see Retry-After",
    }.items()
}


def _form(binary: dict[str, Any]) -> dict[str, Any]:
    """The schema of the fields with the audio, for the description."""
    schema = NativeForm.model_json_schema()
    return schema | {"properties": {"audio": binary, **schema["properties"]}, "required": ["audio"]}


_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {"schema": _form({"type": "string", "format": "binary"})},
        "application/json": {"schema": _form({"type": "string", "description": "data URL: data:audio/wav;base64,..."})},
    },
}


@router.post(
    "/v1/inference/{model:path}",
    response_model=NativeAnswer | Queued,
    responses=_REFUSALS,
    openapi_extra={"requestBody": _BODY},
    summary="Transcribe a file",
    operation_id="inference",
    tags=["native"],
)
async def inference(model: str, request: Request) -> Response:
    """Every field is honoured or refused; unknown ones are ignored, and named in the header `Murmur-Ignored`."""
    context = request_context(request)
    served = context.app.find(model)
    async with context.body(request) as body:
        audio = body.one_audio("audio")
        form = checked(NativeForm, body.single(_FIELDS))
        ignored = [*body.others("audio", *_FIELDS), *request.query_params.keys()]
        options = options_of(form, served)
        if form.webhook:
            await _queue(context, served, form, audio)
            answer: Queued = Queued(request_id=context.id, inference_status=_status("queued"))
        else:
            transcript = await context.transcribe(request, served, options, audio)
            answer = to_answer(transcript, context.id, context.runtime_ms(), context.app.price_per_minute, form)
    return JSONResponse(answer.model_dump(), headers=context.ignored(ignored))


def options_of(form: NativeForm, model: Model) -> DecodeOptions:
    """How this request is decoded: what it does not say is the model's own. Raises `FieldError`."""
    check_language(form.language, model)
    said = {name: value for name in form.model_fields_set if (value := getattr(form, name)) is not None}
    said["word_timestamps"] = said.pop("chunk_level", "segment") == "word"
    said.pop("webhook", None)
    return dataclasses.replace(model.config.decode_options(), **said)


def check_language(language: str | None, model: Model) -> None:
    """Raises `FieldError` for a language that this checkpoint does not have, `NotReadyError` until one is loaded."""
    known = model.info.languages or ("en",)
    if language is not None and language not in known:
        raise FieldError("language", f"{model.id} does not know {language!r}; it knows {', '.join(sorted(known))}")


def to_answer(
    transcript: Transcript, request_id: str, runtime_ms: int, price_per_minute: float, form: NativeForm
) -> NativeAnswer:
    duration = seconds(transcript.duration)
    return NativeAnswer(
        request_id=request_id,
        inference_status=_status(
            "succeeded",
            runtime_ms=runtime_ms,
            cost=round(price_per_minute * duration / 60, 9),
            tokens_generated=transcript.tokens_generated,
            tokens_input=transcript.tokens_input,
        ),
        text=transcript.text,
        segments=[
            NativeSegment(id=number, start=each.start, end=each.end, text=each.text.strip())
            for number, each in enumerate(transcript.segments)
        ],
        language=transcript.language or form.language or "",
        input_length_ms=round(1000 * duration),
        words=[
            NativeWord(text=word.word.strip(), start=word.start, end=word.end)
            for each in transcript.segments
            for word in each.words
        ],
        duration=duration,
    )


def failed(request_id: str, reason: str = "") -> dict[str, Any]:
    """What a webhook is sent where there is no transcript."""
    return Queued(request_id=request_id, inference_status=_status("failed")).model_dump()


def _status(status: str, **figures: Any) -> InferenceStatus:
    none = {"runtime_ms": 0, "cost": 0.0, "tokens_generated": 0, "tokens_input": 0}
    return InferenceStatus.model_validate({"status": status, **none, **figures})


async def _queue(context: Context, model: Model, form: NativeForm, audio: Path) -> None:
    """The request into the spool, where it is safe: only then it may be called queued."""
    webhooks = context.app.webhooks
    if webhooks is None:
        raise RefusedError(503, "webhook: this server takes none")
    assert form.webhook is not None
    order = {"model": model.id, "form": form.model_dump(exclude={"webhook"}, exclude_unset=True)}
    try:
        await webhooks.check(form.webhook)
        await webhooks.accept(context.id, form.webhook, order, audio)
    except WebhookRefusedError as error:
        raise FieldError("webhook", str(error)) from None
    except SpoolFullError as error:
        raise BusyError(str(error), context.gate.pause_s()) from None


def form_of(order: Mapping[str, Any]) -> NativeForm:
    """The form of an order from the spool."""
    return NativeForm.model_validate(order["form"])
