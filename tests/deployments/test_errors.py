"""Errors as a client sees them: status, OpenAI's shape, headers."""

from __future__ import annotations

import json

import pytest

from deployments import errors
from deployments.errors import ServeError


def kinds(base: type[ServeError] = ServeError) -> list[type[ServeError]]:
    return [base, *(kind for below in base.__subclasses__() for kind in kinds(below))]


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_every_error_has_openais_shape(kind: type[ServeError]) -> None:
    body = kind("what went wrong", param="field").body()
    assert set(body) == {"error"}
    assert body["error"] == {"message": "what went wrong", "type": kind.kind, "param": "field", "code": kind.code}
    json.dumps(body)
    assert 400 <= kind.status < 600
    assert (kind.status >= 500) == (kind.kind == "server_error")


def test_every_code_names_one_status() -> None:
    statuses: dict[str, set[int]] = {}
    for kind in kinds():
        statuses.setdefault(kind.code, set()).add(kind.status)
    assert all(len(found) == 1 for found in statuses.values())


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    assert errors.__doc__ is not None
    for kind in kinds()[1:]:
        assert kind.__name__ in errors.__doc__


def test_statuses_are_those_of_the_contract() -> None:
    assert {kind.__name__: kind.status for kind in kinds()[1:]} == {
        "BadRequest": 400,
        "Unauthorized": 401,
        "Forbidden": 403,
        "NotFound": 404,
        "UnknownModel": 404,
        "MethodNotAllowed": 405,
        "BodyTooLarge": 413,
        "UnsupportedMedia": 415,
        "OverCapacity": 429,
        "NoCapacity": 503,
        "AuditUnavailable": 503,
        "SignersUnavailable": 503,
        "PurgeUnavailable": 503,
        "ReplicaLost": 503,
        "DeadlineExceeded": 504,
        "InternalFault": 500,
    }


@pytest.mark.parametrize(("seconds", "header"), [(0.0, "1"), (0.2, "1"), (1.0, "1"), (1.2, "2"), (60.0, "60")])
def test_retry_after_is_whole_seconds_and_never_too_early(seconds: float, header: str) -> None:
    assert errors.OverCapacity("later", retry_after_s=seconds).headers() == {"Retry-After": header}


def test_unauthorized_names_the_scheme() -> None:
    assert errors.Unauthorized("who are you").headers() == {"WWW-Authenticate": "Bearer"}


def test_other_errors_carry_no_headers() -> None:
    assert errors.BadRequest("no").headers() == {}
