"""The OpenAI interface, its base: errors as it writes them, and a reader of JSON objects that names what is wrong."""

from collections.abc import Mapping
from typing import Any

import msgspec

from llmasos.errors import LLMasOSError, MissingBlocksError, PeerRefusedError, SwarmError, UnknownModelError


class ApiError(LLMasOSError):
    """A request that is refused: the status, and the fields of OpenAI's error object."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: int = 400,
        kind: str = "invalid_request_error",
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.param, self.status, self.kind, self.code = param, status, kind, code
        self.retry_after_s = retry_after_s


def as_api_error(error: LLMasOSError) -> ApiError:
    """Any error of ours as one of the interface. A hint becomes part of the message: there is no other place."""
    if isinstance(error, ApiError):
        return error
    message = f"{error.message}. {error.hint}" if error.hint else error.message
    match error:
        case UnknownModelError():
            return ApiError(message, param="model", status=404, code="model_not_found")
        case MissingBlocksError():
            return ApiError(message, status=503, kind="service_unavailable", code="missing_blocks", retry_after_s=5.0)
        case PeerRefusedError():
            wait_s = error.retry_after_s
            return ApiError(message, status=503, kind="service_unavailable", code="busy", retry_after_s=wait_s)
        case SwarmError():
            return ApiError(message, status=503, kind="service_unavailable", code="swarm", retry_after_s=5.0)
    kind = "invalid_request_error" if error.http_status < 500 else "server_error"
    return ApiError(message, status=error.http_status, kind=kind)


def error_body(error: ApiError) -> dict[str, Any]:
    """What the body of every refused request holds, and an event that ends a stream in its middle."""
    shown = {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}
    return {"error": shown}


class Fields:
    """The fields of a JSON object; `where` is its place in the body, for messages."""

    def __init__(self, body: Mapping[str, Any], where: str = "") -> None:
        self._body = body
        self._where = where

    def name(self, field: str) -> str:
        """The field, as an error names it."""
        return f"{self._where}.{field}" if self._where else field

    def get(self, field: str) -> Any:
        """The value; None for null, too."""
        return self._body.get(field)

    def wrong(self, field: str, wanted: str) -> ApiError:
        """The error for a value that is not what is wanted."""
        name = self.name(field)
        return ApiError(f"{name} must be {wanted}, not {shown(self.get(field))}", param=name)

    def number(self, field: str, default: float, least: float, most: float) -> float:
        """A finite number in [least, most]."""
        value = self.get(field)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise self.wrong(field, f"a number from {least:g} to {most:g}")
        return float(value)

    def whole(self, field: str, least: int, most: int | None = None) -> int | None:
        """A whole number in [least, most], or None."""
        value = self.get(field)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or value < least
            or (most is not None and value > most)
        ):
            raise self.wrong(field, f"a whole number from {least} {'up' if most is None else f'to {most}'}")
        return value

    def flag(self, field: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(field, "true or false")
        return value

    def text(self, field: str) -> str:
        """A string that must be there."""
        value = self.get(field)
        if not isinstance(value, str) or not value:
            raise self.wrong(field, "a text")
        return value

    def inner(self, field: str) -> "Fields | None":
        """An object within."""
        value = self.get(field)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(field, "an object")
        return Fields(value, self.name(field))


def parse_body(raw: bytes) -> Fields:
    """The JSON object of a request's body. Raises ApiError for anything else."""
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError("the body is not a JSON object", code="invalid_json")
    return Fields(body)


def shown(value: Any) -> str:
    """A value of a request in a message, cut short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
