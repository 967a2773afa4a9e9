"""The gateway's socket: what is no request is refused in the form of all errors, and nobody logs what stood in it."""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong

from llmasos.client.openai_fields import ApiError, error_body

log = logging.getLogger(__name__)

SHUTDOWN_TIMEOUT_S = 5.0
CONTINUE = "100-continue"

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Runner(web.AppRunner):
    """Serves an application. A client that goes away cancels what was done for it."""

    __slots__ = ()

    def __init__(self, app: web.Application) -> None:
        super().__init__(app, handler_cancellation=True, access_log=None, shutdown_timeout=SHUTDOWN_TIMEOUT_S)

    async def _make_server(self) -> web.Server:  # aiohttp has no other place to say how connections refuse
        made = await super()._make_server()
        answer: Handler = made.request_handler

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            # The application would refuse it before any middleware, in plain text.
            if request.headers.get("Expect", CONTINUE).lower() != CONTINUE:
                return _refusal(ApiError(f"no expectation is met but {CONTINUE}", status=417, code="expectation"))
            return await answer(request)

        return _Server(handle, request_factory=made.request_factory, handler_cancellation=True)


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        without_log: dict[str, Any] = {"access_log": None}
        return _Connection(self, loop=asyncio.get_running_loop(), **without_log)


class _Connection(web.RequestHandler):
    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What no middleware sees. Neither `exc` nor `message` is told: they quote headers, which may hold a key."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is under way already")
        if isinstance(exc, LineTooLong):
            refusal = ApiError("the first line or a header is too long", status=431, code="headers_too_large")
        elif status < HTTPStatus.INTERNAL_SERVER_ERROR:
            refusal = ApiError("this is not a request that HTTP/1.1 knows", status=status, code="bad_http")
        else:
            refusal = ApiError("the gateway failed; its log says how", status=status, kind="server_error")
            log.error("a connection failed: %s", type(exc).__name__)
        return _refusal(refusal)


def _refusal(error: ApiError) -> web.Response:
    """What was not read to its end is not read any further."""
    answer = web.json_response(error_body(error), status=error.status)
    answer.headers.update({"x-request-id": f"req_{secrets.token_hex(12)}", "Server": "llmasos"})
    answer.force_close()
    return answer
