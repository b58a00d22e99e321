"""The HTTP application, without Ray: its parts put together, and the routes that are no model's.

    create_app(models, settings)  →  ASGI application      serve it with uvicorn (`server.py`)

`/healthz`: the process answers. `/readyz`: every model has really decoded something lately. `/metrics`, `/docs`,
`/openapi.json` and the page at `/` hold nothing of a caller's and need no token.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse

from pipeline.config import LimitsConfig
from pipeline.errors import MurmurError
from pipeline.machine import usable_cores
from serve_app import native, openai
from serve_app.auth import Tokens
from serve_app.bodies import Bodies, uploads_folder
from serve_app.context import App, Context, request_context
from serve_app.docs import DOCS_POLICY, describe
from serve_app.door import Door, is_openai
from serve_app.errors import FieldError, RefusedError, answer
from serve_app.limits import Gate
from serve_app.meters import Meters
from serve_app.serving import Model, Readers
from serve_app.webhook import Webhooks, WebhookSettings

log = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; media-src"
    " blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
LOOK_EVERY_S = 2.0  # between two looks at whether the engines work


def create_app(
    models: Sequence[Model],
    limits: LimitsConfig | None = None,
    *,
    tokens: Tokens | None = None,
    webhooks: WebhookSettings | None = None,
    price_per_minute: float = 0.0,
    canary_s: float = 30.0,
    engine_timeout_s: float = 600.0,
    ui: bool = True,
    reader_threads: int | None = None,
) -> Server:
    """The application. `webhooks`: None takes none. It starts and stops what it needs in its lifespan."""
    limits = limits or LimitsConfig()
    app = App(
        models=tuple(models),
        tokens=tokens or Tokens(),
        limits=limits,
        gate=Gate(limits, sum(model.lanes for model in models)),
        readers=Readers(reader_threads or usable_cores()),
        meters=Meters(),
        price_per_minute=price_per_minute,
        canary_s=canary_s,
        engine_timeout_s=engine_timeout_s,
    )
    api = FastAPI(
        title="Murmuration",
        version="1",
        summary="Transcription with Whisper: DeepInfra's route and OpenAI's.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lambda _: _lifespan(app, webhooks),
    )
    api.include_router(native.router)
    api.include_router(openai.router)
    _add_own_routes(api, app)
    if ui:
        _add_page(api)
    _add_errors(api, app)
    _describe(api, app)
    return Server(Door(api, app), app)


class Server:
    """The ASGI application, and the parts that whoever runs it looks at."""

    def __init__(self, asgi: Door, app: App) -> None:
        self.asgi, self.app = asgi, app

    def drain(self) -> None:
        """Not ready from now on; what runs goes on."""
        self.app.draining = True


@asynccontextmanager
async def _lifespan(app: App, settings: WebhookSettings | None) -> AsyncIterator[None]:
    try:
        async with _running(app, settings):
            yield
    except MurmurError as error:  # uvicorn would only log it
        app.failure = error
        raise


@asynccontextmanager
async def _running(app: App, settings: WebhookSettings | None) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        app.bodies = Bodies(await stack.enter_async_context(uploads_folder()), app.limits.body_mb << 20)
        stack.callback(app.readers.close)
        looking = asyncio.create_task(_look(app))
        stack.push_async_callback(_stopped, looking)
        if settings is not None:
            app.webhooks = Webhooks(settings, lambda *order: _answer(app, *order), native.failed)
            await app.webhooks.start()
            stack.push_async_callback(app.webhooks.close, 5.0)
        yield


async def _answer(app: App, request_id: str, order: dict[str, Any], audio: Path) -> dict[str, Any]:
    """What a webhook is sent. Raises what may pass, and is tried again."""
    context = Context(app, request_id)
    form = native.form_of(order)
    try:
        model = app.find(order["model"])
        transcript = await context.answered(model, native.options_of(form, model), audio)
    except (RefusedError, FieldError) as error:  # of this recording's own, or of a model that is no more
        log.warning("request %s: %s", request_id, error)
        return native.failed(request_id)
    answered = native.to_answer(transcript, request_id, context.runtime_ms(), app.price_per_minute, form)
    return answered.model_dump()


async def _look(app: App) -> None:
    """Whether each model's engines answer and work, again and again."""
    while True:
        for model in app.models:
            app.standing[model.id] = await _why_not(app, model)
        app.gate.size(sum(model.lanes for model in app.models))
        app.meters.ready.set(app.why_not_ready() is None)
        await asyncio.sleep(LOOK_EVERY_S)


async def _why_not(app: App, model: Model) -> str | None:
    try:
        async with asyncio.timeout(5 * LOOK_EVERY_S):
            standing = await model.standing()
        return standing.why_not(app.canary_s, app.engine_timeout_s)
    except TimeoutError:
        return "its engine does not answer"
    except MurmurError as error:
        return str(error)
    except Exception as error:  # Ray has many
        return f"its engine does not answer ({type(error).__name__})"


async def _stopped(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _add_own_routes(api: FastAPI, app: App) -> None:
    @api.get("/healthz", tags=["service"])
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @api.get("/readyz", tags=["service"], responses={503: {"description": "why it is not"}})
    async def readyz() -> JSONResponse:
        """Every model is loaded and has decoded something lately."""
        reason = app.why_not_ready()
        body = {"status": "ready"} if reason is None else {"status": "not ready", "reason": reason}
        return JSONResponse(body, 200 if reason is None else 503, {} if reason is None else {"Retry-After": "5"})

    @api.get("/metrics", tags=["service"], response_class=Response)
    async def metrics() -> Response:
        """Prometheus text."""
        app.meters.windows.labels("running").set(app.gate.running)
        app.meters.windows.labels("waiting").set(app.gate.waiting)
        for state, count in (app.webhooks.counts() if app.webhooks else {}).items():
            app.meters.webhooks.labels(state).set(count)
        return Response(app.meters.page(), media_type=app.meters.content_type)

    @api.get("/v1/webhooks", tags=["native"])
    async def webhooks(request: Request) -> dict[str, Any]:
        """How many requests with a webhook are on their way, and those that could not be delivered."""
        context = request_context(request)
        of = context.app.webhooks
        return {"counts": of.counts() if of else {}, "dead_letters": of.dead_letters() if of else []}

    @api.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        """The description for a person; from no other server's scripts."""
        return Response(
            describe(api.openapi()), media_type="text/html", headers={"Content-Security-Policy": DOCS_POLICY}
        )


def _add_page(api: FastAPI) -> None:
    headers = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"}

    @api.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers=headers)

    @api.get("/page/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        file = PAGE / name
        if name not in {each.name for each in PAGE.iterdir()}:
            raise HTTPException(404)
        return FileResponse(file, headers=headers)


def _add_errors(api: FastAPI, app: App) -> None:
    @api.exception_handler(MurmurError)
    @api.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        context = request_context(request)
        said = answer(error, openai=is_openai(request.url.path), busy_status=app.limits.busy_status)
        context.kind = said.kind
        return JSONResponse(said.body, said.status, said.headers)

    @api.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        """What the router itself refuses: no such path, no such method."""
        said = answer(RefusedError(error.status_code, str(error.detail)), openai=is_openai(request.url.path))
        return JSONResponse(said.body, error.status_code, {**said.headers, **(error.headers or {})})


def _describe(api: FastAPI, app: App) -> None:
    """Tokens in the description, where some are needed."""
    made = api.openapi

    def openapi() -> dict[str, Any]:
        schema = made()
        schema.setdefault("components", {})["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        if not app.tokens.is_open:
            schema["security"] = [{"token": []}]
        return schema

    api.openapi = openapi  # type: ignore[method-assign]
