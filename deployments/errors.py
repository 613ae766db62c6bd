"""Errors that reach a client, with their HTTP status and their name in OpenAI's error shape.

ServeError
├── BadRequest 400          malformed, unknown key, parameter out of range, prompt too long, bad schema
├── Unauthorized 401        no or wrong bearer key
├── Forbidden 403           the principal may not do this
├── NotFound 404
│   └── UnknownModel 404
├── MethodNotAllowed 405
├── BodyTooLarge 413
├── UnsupportedMedia 415
├── OverCapacity 429        this caller, or the ingress, has too much in flight
├── NoCapacity 503          no replica could take it within the named wait
├── AuditUnavailable 503    the audit log cannot be written, and private work is refused until it can
├── SignersUnavailable 503  the keys that a token is checked against cannot be had now
├── PurgeUnavailable 503    a purge cannot be kept, and nothing was purged
├── ReplicaLost 503         a replica died and the request could not go on
├── DeadlineExceeded 504
└── InternalFault 500
"""

from __future__ import annotations

import math
from typing import ClassVar


class ServeError(Exception):
    """Base. `param` names the field at fault, `retry_after_s` becomes Retry-After."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    kind: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, object]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


class BadRequest(ServeError):
    status, code, kind = 400, "invalid_request", "invalid_request_error"


class Unauthorized(ServeError):
    status, code, kind = 401, "invalid_api_key", "authentication_error"


class Forbidden(ServeError):
    status, code, kind = 403, "forbidden", "permission_error"


class NotFound(ServeError):
    status, code, kind = 404, "not_found", "invalid_request_error"


class UnknownModel(NotFound):
    code = "model_not_found"


class MethodNotAllowed(ServeError):
    status, code, kind = 405, "method_not_allowed", "invalid_request_error"


class BodyTooLarge(ServeError):
    status, code, kind = 413, "body_too_large", "invalid_request_error"


class UnsupportedMedia(ServeError):
    status, code, kind = 415, "unsupported_media_type", "invalid_request_error"


class OverCapacity(ServeError):
    status, code, kind = 429, "over_capacity", "rate_limit_error"


class NoCapacity(ServeError):
    status, code = 503, "no_capacity"


class AuditUnavailable(ServeError):
    status, code = 503, "audit_unavailable"


class SignersUnavailable(ServeError):
    status, code = 503, "signers_unavailable"


class PurgeUnavailable(ServeError):
    status, code = 503, "purge_unavailable"


class ReplicaLost(ServeError):
    status, code = 503, "replica_lost"


class DeadlineExceeded(ServeError):
    status, code = 504, "deadline_exceeded"


class InternalFault(ServeError):
    pass
