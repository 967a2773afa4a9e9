"""What every request passes: a name for it, who sends it, and errors that are always JSON of one form."""

import asyncio
import ipaddress
import logging
import math
import re
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from llmasos.client.gateway_keys import ANYBODY, Key, KeyRing
from llmasos.client.gateway_metrics import Metrics
from llmasos.client.openai_fields import ApiError, as_api_error, error_body
from llmasos.config import GatewayConfig
from llmasos.errors import LLMasOSError
from llmasos.logs import about

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

KEY = web.RequestKey("key", Key)
ID = web.RequestKey("id", str)

OPEN = ("/", "/health", "/openapi.json", "/web/")
"""What needs no key: the page itself, which shows nothing without one, and what machines ask to see if we live."""
SWARM = ("/metrics", "/api/")
LOCAL_NAMES = ("localhost",)
TRACE = "x-llmasos-trace"


class Door:
    """The middleware of a gateway."""

    def __init__(self, config: GatewayConfig, keys: KeyRing | None, metrics: Metrics) -> None:
        self._config = config
        self._keys = keys
        self._metrics = metrics

    def middleware(self) -> Any:
        """As aiohttp wants it."""

        @web.middleware
        async def pass_through(request: web.Request, handler: Handler) -> web.StreamResponse:
            request[ID] = _request_id(request)
            with about(request=request[ID]):
                return await self._pass(request, handler)

        return pass_through

    async def _pass(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        begin = asyncio.get_running_loop().time()
        try:
            if request.method == "OPTIONS" and self._allowed_origin(request):
                response: web.StreamResponse = web.Response(status=204)
            else:
                self._check_host(request)
                request[KEY] = self._check_key(request)
                response = await handler(request)
        except web.HTTPException as error:
            response = self._answer(request, _http_error(request, error))
            if allow := error.headers.get("Allow"):
                response.headers["Allow"] = allow
        except LLMasOSError as error:
            response = self._answer(request, as_api_error(error))
        except web.RequestPayloadError:
            response = self._answer(request, ApiError("the body is not what its headers say", code="invalid_body"))
        except ConnectionResetError:
            self._metrics.cancelled.inc()
            raise
        except Exception as error:  # a client is told nothing of our insides; the log is
            log.error("request %s failed: %s: %s", request[ID], type(error).__name__, error, exc_info=error)
            message = f"the gateway failed; its log has the reason under {request[ID]}"
            response = self._answer(request, ApiError(message, status=500, kind="server_error"))
        if not response.prepared:
            response.headers.update(self.headers(request))
        route = request.match_info.route.resource
        self._metrics.requests.labels(route.canonical if route is not None else "other", str(response.status)).inc()
        if request.method == "POST":
            spent_ms = 1e3 * (asyncio.get_running_loop().time() - begin)
            log.info("%s is answered with %d after %.0f ms", request.path, response.status, spent_ms)
        return response

    def headers(self, request: web.Request) -> dict[str, str]:
        """What every answer carries; a stream needs them before it begins."""
        found = {"x-request-id": request[ID], "X-Content-Type-Options": "nosniff", "Server": "llmasos"}
        if origin := self._allowed_origin(request):
            found |= {
                "Access-Control-Allow-Origin": origin,
                "Access-Control-Allow-Headers": f"authorization, content-type, {TRACE}",
                "Access-Control-Allow-Methods": "GET, POST",
                "Access-Control-Expose-Headers": "x-request-id, retry-after",
                "Vary": "Origin",
            }
        return found

    def _answer(self, request: web.Request, error: ApiError) -> web.Response:
        headers = {}
        if error.retry_after_s is not None:
            headers["Retry-After"] = str(max(math.ceil(error.retry_after_s), 1))
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if error.status >= 500:
            log.warning("request %s: %s", request[ID], error.message)
        return web.json_response(error_body(error), status=error.status, headers=headers)

    def _allowed_origin(self, request: web.Request) -> str:
        origin = request.headers.get("Origin", "")
        allowed = self._config.cors_origins
        return origin if origin and (origin in allowed or "*" in allowed) else ""

    def _check_host(self, request: web.Request) -> None:
        """Without keys, a name that points at this machine must not be a stranger's: its pages could read us."""
        if self._keys is not None or not _is_loopback(self._config.host):
            return
        name = re.sub(r":\d+$", "", request.host).strip("[]")
        if not _is_loopback(name):
            raise ApiError(f"this gateway is for this machine, not for {name!r}", status=403, code="wrong_host")

    def _check_key(self, request: web.Request) -> Key:
        path = request.path
        if self._keys is None or path in OPEN or path.startswith("/web/"):
            return ANYBODY
        scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
        key = self._keys.find(secret.strip()) if scheme.lower() == "bearer" and secret else None
        if key is None:
            said = "that key is not known here" if secret else "no API key was sent"
            raise ApiError(
                f"{said}: send the header Authorization: Bearer KEY",
                status=401,
                kind="authentication_error",
                code="invalid_api_key",
            )
        scope = "swarm" if path.startswith(SWARM) else "generate"
        if scope not in key.scopes:
            raise ApiError(
                f"this key has not the scope {scope}", status=403, kind="permission_error", code="insufficient_scope"
            )
        return key


def _request_id(request: web.Request) -> str:
    """The client's own name for the request if it is harmless to repeat, else one of ours."""
    theirs = request.headers.get("x-request-id", "")
    return theirs if re.fullmatch(r"[\w.:-]{1,128}", theirs) else f"req_{secrets.token_hex(12)}"


def _http_error(request: web.Request, error: web.HTTPException) -> ApiError:
    match error.status:
        case 404:
            message = f"there is no {request.path}; /openapi.json lists what there is"
        case 405:
            message = f"{request.path} does not take {request.method}"
        case 413:
            message = "the body is too large"
        case _:
            message = error.reason
    code = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}.get(error.status)
    return ApiError(message, status=error.status, code=code)


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name.lower().rstrip(".") in LOCAL_NAMES
