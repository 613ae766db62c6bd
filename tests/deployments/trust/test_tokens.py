"""Tokens: what is taken, each way of being refused, and a key cache under faults."""

from __future__ import annotations

import base64
import gzip
import hashlib
import hmac
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from deployments.trust.principals import MAX_CASES, MAX_ROLES, Principal
from deployments.trust.tokens import (
    KEYS_MAX_AGE_S,
    KEYS_MIN_REFETCH_S,
    KEYS_TTL_S,
    LEEWAY_S,
    MAX_JWKS_BYTES,
    MAX_JWKS_KEYS,
    MAX_TOKEN_CHARS,
    AuthReason,
    ClaimNames,
    FetchOutcome,
    JwksError,
    JwksFile,
    JwksUrl,
    KeyCache,
    TokenRefused,
    TokenRules,
    TokenVerifier,
    parse_jwks,
)
from engine.zone import EPHEMERAL, Zone
from tests.deployments.support import Clock

NOW = 1_800_000_000.0
ISSUER, AUDIENCE = "https://id.example", "zoneserve"
RSA_KEY, OTHER_RSA_KEY = (rsa.generate_private_key(65537, 2048) for _ in range(2))
EC_KEY = ec.generate_private_key(ec.SECP256R1())
RULES = TokenRules(issuer=ISSUER, audience=AUDIENCE)


def jwk(key: Any, kid: str | None, **changes: object) -> dict[str, Any]:
    """The JWK of a key, public unless it is a private one."""
    kind = jwt.algorithms.RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey | rsa.RSAPublicKey) else None
    document = (kind or jwt.algorithms.ECAlgorithm).to_jwk(key, as_dict=True)
    document.pop("key_ops", None)
    return document | ({"kid": kid} if kid is not None else {}) | changes


def jwks(*keys: object) -> bytes:
    return json.dumps({"keys": list(keys)}).encode()


RSA_JWK, EC_JWK = jwk(RSA_KEY.public_key(), "rsa-1"), jwk(EC_KEY.public_key(), "ec-1")
KEYS = jwks(RSA_JWK, EC_JWK)


def claims(**changes: Any) -> dict[str, Any]:
    """Good claims; a change to None takes one out."""
    good = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "tenant": "acme", "exp": int(NOW) + 600} | changes
    return {name: value for name, value in good.items() if value is not None}


def token(key: Any = RSA_KEY, *, kid: str | None = "rsa-1", alg: str = "RS256", **changes: Any) -> str:
    return jwt.encode(claims(**changes), key, algorithm=alg, headers={"kid": kid} if kid is not None else {})


def raw_token(header: object, payload: object, sign: Callable[[bytes], bytes] = lambda _: b"") -> str:
    """A token of any header and payload."""

    def part(data: bytes) -> bytes:
        return base64.urlsafe_b64encode(data).rstrip(b"=")

    def document(value: object) -> bytes:
        return value if isinstance(value, bytes) else json.dumps(value).encode()

    signing_input = part(document(header)) + b"." + part(document(payload))
    return (signing_input + b"." + part(sign(signing_input))).decode()


def rs256(signing_input: bytes) -> bytes:
    return jwt.algorithms.RSAAlgorithm(jwt.algorithms.RSAAlgorithm.SHA256).sign(signing_input, RSA_KEY)


def verifier(rules: TokenRules = RULES, keys: bytes = KEYS, now: float = NOW) -> TokenVerifier:
    cache = KeyCache(lambda: keys, Clock(), on_fetch=lambda _: None)
    return TokenVerifier(rules, cache, Clock(now))


def principal_of(text: str, rules: TokenRules = RULES) -> Principal:
    return verifier(rules).principal(text)


def reason_for(text: str, **options: Any) -> AuthReason:
    with pytest.raises(TokenRefused) as refusal:
        verifier(**options).principal(text)
    assert str(refusal.value) == refusal.value.reason.value
    return refusal.value.reason


# --- what is taken ---


@pytest.mark.parametrize("text", [token(), token(EC_KEY, kid="ec-1", alg="ES256")], ids=["RS256", "ES256"])
def test_token_names_its_principal(text: str) -> None:
    assert principal_of(text) == Principal("ann", "acme", EPHEMERAL)


def test_roles_and_cases_come_from_claims() -> None:
    ann = principal_of(token(roles=["reviewer", "zone-admin"], cases=["c-1", "c-2"]))
    assert ann.roles == {"reviewer", "zone-admin"}
    assert ann.cases == {Zone.parse("tenant/acme/case/c-1"), Zone.parse("tenant/acme/case/c-2")}
    assert ann.zone == EPHEMERAL


def test_unlabelled_prompts_of_a_token_for_one_case_go_there() -> None:
    assert principal_of(token(cases=["c-1"])).zone == Zone.parse("tenant/acme/case/c-1")


def test_claims_may_have_other_names() -> None:
    names = ClaimNames(subject="https://a/user", tenant="org", roles="groups", cases="matters")
    text = token(sub=None, tenant="ignored", org="acme", groups=["r"], matters=["c"], **{"https://a/user": "bob"})
    bob = principal_of(text, TokenRules(ISSUER, AUDIENCE, names))
    assert (bob.name, bob.tenant, bob.roles) == ("bob", "acme", {"r"})
    assert bob.cases == {Zone.parse("tenant/acme/case/c")}


def test_one_of_several_audiences_is_enough() -> None:
    assert principal_of(token(aud=["other", AUDIENCE])).name == "ann"


@pytest.mark.parametrize(("claim", "value"), [("exp", -LEEWAY_S + 1), ("nbf", LEEWAY_S), ("iat", LEEWAY_S)])
def test_clocks_may_differ_by_the_leeway(claim: str, value: float) -> None:
    assert principal_of(token(**{claim: NOW + value})).name == "ann"


# --- what is refused ---


def hs256_with_the_public_key() -> str:
    pem = RSA_KEY.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    header = {"alg": "HS256", "typ": "JWT", "kid": "rsa-1"}
    return raw_token(header, claims(), lambda data: hmac.new(pem, data, hashlib.sha256).digest())


REFUSED = {
    "alg none": (raw_token({"alg": "none", "kid": "rsa-1"}, claims()), AuthReason.ALGORITHM),
    "alg None": (raw_token({"alg": "None", "kid": "rsa-1"}, claims()), AuthReason.ALGORITHM),
    "alg null": (raw_token({"alg": None, "kid": "rsa-1"}, claims()), AuthReason.ALGORITHM),
    "alg list": (raw_token({"alg": ["RS256"], "kid": "rsa-1"}, claims(), rs256), AuthReason.ALGORITHM),
    "no alg": (raw_token({"kid": "rsa-1"}, claims(), rs256), AuthReason.ALGORITHM),
    "HS256 with the public key": (hs256_with_the_public_key(), AuthReason.ALGORITHM),
    "RS512": (token(alg="RS512"), AuthReason.ALGORITHM),
    "PS256": (token(alg="PS256"), AuthReason.ALGORITHM),
    "key of the other algorithm": (token(EC_KEY, kid="rsa-1", alg="ES256"), AuthReason.UNKNOWN_KEY_ID),
    "unknown kid": (token(kid="rsa-2"), AuthReason.UNKNOWN_KEY_ID),
    "no kid": (token(kid=None), AuthReason.UNKNOWN_KEY_ID),
    "kid of another type": (raw_token({"alg": "RS256", "kid": 1}, claims(), rs256), AuthReason.MALFORMED),
    "key inside the token": (
        raw_token({"alg": "RS256", "kid": "x", "jwk": RSA_JWK}, claims(), rs256),
        AuthReason.UNKNOWN_KEY_ID,
    ),
    "signed by another key": (token(OTHER_RSA_KEY), AuthReason.BAD_SIGNATURE),
    "no signature": (token().rpartition(".")[0] + ".", AuthReason.BAD_SIGNATURE),
    "short signature": (
        raw_token({"alg": "RS256", "kid": "rsa-1"}, claims(), lambda data: rs256(data)[:-1]),
        AuthReason.BAD_SIGNATURE,
    ),
    "cut off": (token()[:-1], AuthReason.MALFORMED),
    "other payload": (".".join([*token().split(".")[:1], token(sub="bob").split(".")[1], token().split(".")[2]]),
                      AuthReason.BAD_SIGNATURE),
    "two parts": (token().rpartition(".")[0], AuthReason.MALFORMED),
    "four parts": (token() + ".x", AuthReason.MALFORMED),
    "empty": ("", AuthReason.MALFORMED),
    "dots": ("..", AuthReason.MALFORMED),
    "not base64": ("!!.!!.!!", AuthReason.MALFORMED),
    "lone surrogate": ("\ud800.a.b", AuthReason.MALFORMED),
    "header no object": (raw_token([], claims(), rs256), AuthReason.MALFORMED),
    "header no JSON": (raw_token(b"{", claims(), rs256), AuthReason.MALFORMED),
    "header nested": (raw_token(b"[" * 3000, claims(), rs256), AuthReason.MALFORMED),
    "payload no object": (raw_token({"alg": "RS256", "kid": "rsa-1"}, [], rs256), AuthReason.MALFORMED),
    "payload no JSON": (raw_token({"alg": "RS256", "kid": "rsa-1"}, b"{", rs256), AuthReason.MALFORMED),
    "unknown critical extension": (
        raw_token({"alg": "RS256", "kid": "rsa-1", "crit": ["x"], "x": 1}, claims(), rs256),
        AuthReason.MALFORMED,
    ),
    "detached payload": (
        raw_token({"alg": "RS256", "kid": "rsa-1", "crit": ["b64"], "b64": False}, claims(), rs256),
        AuthReason.MALFORMED,
    ),
    "oversized": (token(note="x" * MAX_TOKEN_CHARS), AuthReason.TOO_LONG),
    "no exp": (token(exp=None), AuthReason.MISSING_CLAIM),
    "no aud": (token(aud=None), AuthReason.MISSING_CLAIM),
    "no iss": (token(iss=None), AuthReason.MISSING_CLAIM),
    "no sub": (token(sub=None), AuthReason.MISSING_CLAIM),
    "no tenant": (token(tenant=None), AuthReason.MISSING_CLAIM),
    "expired": (token(exp=int(NOW - LEEWAY_S)), AuthReason.EXPIRED),
    "not yet valid": (token(nbf=int(NOW + LEEWAY_S) + 1), AuthReason.NOT_YET_VALID),
    "issued in the future": (token(iat=int(NOW + LEEWAY_S) + 1), AuthReason.NOT_YET_VALID),
    "wrong audience": (token(aud="other"), AuthReason.WRONG_AUDIENCE),
    "audience that begins alike": (token(aud=AUDIENCE + "x"), AuthReason.WRONG_AUDIENCE),
    "audience of another type": (token(aud={"a": 1}), AuthReason.WRONG_AUDIENCE),
    "wrong issuer": (token(iss=ISSUER + "/"), AuthReason.WRONG_ISSUER),
}  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_token_is_refused_with_its_reason(text: str, reason: AuthReason) -> None:
    assert reason_for(text) is reason


def test_issuer_of_another_type_is_refused() -> None:
    assert reason_for(raw_token({"alg": "RS256", "kid": "rsa-1"}, claims(iss=1), rs256)) is AuthReason.WRONG_ISSUER


@pytest.mark.parametrize("claim", ["exp", "nbf", "iat"])
@pytest.mark.parametrize(
    "value", ["1900000000", True, [], {}, -1, 10**400, float("inf"), float("nan"), float("-inf"), 1e300]
)
def test_time_that_is_none_is_refused(claim: str, value: object) -> None:
    assert reason_for(token(**{claim: value})) is AuthReason.BAD_CLAIM


BAD_NAMES = [
    "", "Ann", "ann smith", "a/b", "..", "a..b", ".a", "a\x00", "a\n", "ａｎｎ", "аnn", "a%2fb", "*", "{tenant}",
    "x" * 65, 7, True, ["ann"], {"a": 1},
]  # fmt: skip


@pytest.mark.parametrize("value", BAD_NAMES)
@pytest.mark.parametrize("claim", ["sub", "tenant"])
def test_name_that_could_not_stand_in_a_path_is_refused(claim: str, value: object) -> None:
    payload = claims(**{claim: value})
    assert reason_for(raw_token({"alg": "RS256", "kid": "rsa-1"}, payload, rs256)) is AuthReason.BAD_CLAIM


@pytest.mark.parametrize("claim", ["roles", "cases"])
@pytest.mark.parametrize("value", ["reviewer", {"a": 1}, 1, *([name] for name in BAD_NAMES)])
def test_list_of_names_that_is_none_is_refused(claim: str, value: object) -> None:
    assert reason_for(token(**{claim: value})) is AuthReason.BAD_CLAIM


@pytest.mark.parametrize(("claim", "limit"), [("roles", MAX_ROLES), ("cases", MAX_CASES)])
def test_number_of_names_is_bounded(claim: str, limit: int) -> None:
    names = [f"n{index}" for index in range(limit + 1)]
    assert principal_of(token(**{claim: names[:limit]})).name == "ann"
    assert reason_for(token(**{claim: names})) is AuthReason.BAD_CLAIM


@given(data=st.data())
def test_no_part_of_a_token_can_be_changed(data: st.DataObject) -> None:
    good = token()
    at = data.draw(st.integers(0, len(good) - 1))
    bad = good[:at] + data.draw(st.characters(codec="ascii").filter(lambda char: char != good[at])) + good[at + 1 :]
    assert reason_for(bad) in AuthReason


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(
    changes=st.dictionaries(
        st.sampled_from(["iss", "aud", "sub", "tenant", "exp", "nbf", "jti", "roles", "cases"]), json_values
    )
)
def test_whatever_an_issuer_signs_gives_a_principal_or_a_reason(changes: dict[str, Any]) -> None:
    text = raw_token({"alg": "RS256", "kid": "rsa-1"}, claims() | changes, rs256)
    with suppress(TokenRefused):
        principal = principal_of(text)
        assert all(case.tenant == principal.tenant for case in principal.cases)


# --- key sets ---

WEAK_JWK = jwk(rsa.generate_private_key(65537, 1024).public_key(), "weak")
P384_JWK = jwk(ec.generate_private_key(ec.SECP384R1()).public_key(), "p384")
UNUSABLE = {
    "weak": WEAK_JWK,
    "another curve": P384_JWK,
    "another curve that says it is ours": P384_JWK | {"alg": "ES256"},
    "a private RSA key": jwk(RSA_KEY, "k"),
    "a private EC key": jwk(EC_KEY, "k"),
    "a secret": {"kty": "oct", "kid": "k", "k": "c2VjcmV0"},
    "a secret for ours": {"kty": "oct", "kid": "k", "k": "c2VjcmV0", "alg": "RS256"},
    "for encryption": RSA_JWK | {"use": "enc"},
    "for signing only": RSA_JWK | {"key_ops": ["sign"]},
    "of another algorithm": RSA_JWK | {"alg": "PS256"},
    "without an id": jwk(RSA_KEY.public_key(), None),
    "with a number for an id": RSA_JWK | {"kid": 1},
    "without a modulus": {"kty": "RSA", "kid": "k", "e": "AQAB"},
    "with a list for a modulus": RSA_JWK | {"n": []},
    "off the curve": EC_JWK | {"x": EC_JWK["y"]},
    "no object": "rsa",
}


@pytest.mark.parametrize("entry", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_key_that_is_not_for_us_is_passed_over(entry: object) -> None:
    assert list(parse_jwks(jwks(entry, EC_JWK))) == [("ec-1", "ES256")]
    with pytest.raises(JwksError) as refusal:
        parse_jwks(jwks(entry))
    assert refusal.value.outcome is FetchOutcome.NO_USABLE_KEY


def test_two_algorithms_may_share_a_key_id() -> None:
    assert set(parse_jwks(jwks(RSA_JWK | {"kid": "k"}, EC_JWK | {"kid": "k"}))) == {("k", "RS256"), ("k", "ES256")}


@pytest.mark.parametrize(
    ("data", "outcome"),
    [
        (b"", FetchOutcome.MALFORMED),
        (b"\xff\xfe", FetchOutcome.MALFORMED),
        (b"[" * 100_000, FetchOutcome.MALFORMED),
        (b"[]", FetchOutcome.MALFORMED),
        (b'{"keys": {}}', FetchOutcome.MALFORMED),
        (b'{"keys": []}', FetchOutcome.NO_USABLE_KEY),
        (jwks(RSA_JWK, RSA_JWK), FetchOutcome.MALFORMED),
        (jwks(RSA_JWK, *[{}] * MAX_JWKS_KEYS), FetchOutcome.TOO_LARGE),
        (KEYS + b" " * MAX_JWKS_BYTES, FetchOutcome.TOO_LARGE),
    ],
)
def test_key_set_that_is_none_is_refused(data: bytes, outcome: FetchOutcome) -> None:
    with pytest.raises(JwksError) as refusal:
        parse_jwks(data)
    assert refusal.value.outcome is outcome


jwk_members = st.sampled_from(["kty", "kid", "alg", "use", "n", "e", "crv", "x", "y", "d", "key_ops"])
jwk_values = st.sampled_from(["RSA", "EC", "oct", "AQAB", "P-256", "sig", "k", RSA_JWK["n"], EC_JWK["x"]])


@given(st.lists(st.dictionaries(jwk_members, jwk_values | json_values) | json_values, max_size=4))
@settings(max_examples=300)
def test_whatever_a_key_set_holds_gives_keys_or_a_reason(entries: list[object]) -> None:
    with suppress(JwksError):
        assert parse_jwks(jwks(*entries))


# --- where they come from ---


def test_keys_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "jwks.json"
    path.write_bytes(KEYS)
    assert JwksFile(path)() == KEYS


def test_missing_file_is_unreachable_and_a_large_one_is_not_read_whole(tmp_path: Path) -> None:
    with pytest.raises(JwksError) as refusal:
        JwksFile(tmp_path / "none")()
    assert refusal.value.outcome is FetchOutcome.UNREACHABLE
    (tmp_path / "large").write_bytes(b" " * 2 * MAX_JWKS_BYTES)
    assert len(JwksFile(tmp_path / "large")()) == MAX_JWKS_BYTES + 1


@contextmanager
def http_server(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """The URL of a server that answers every GET so."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.block_on_close = False
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/jwks"
        finally:
            server.shutdown()
            thread.join()


def answer_with(status: int, body: bytes = b"", **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b" " * 1024)
    except OSError:
        pass


def outcome_of(url: str, clock: Callable[[], float] | None = None, timeout_s: float = 5.0) -> FetchOutcome:
    with pytest.raises(JwksError) as refusal:
        parse_jwks(JwksUrl(url, clock or Clock(), timeout_s=timeout_s, allow_http=True)())
    return refusal.value.outcome


def test_keys_are_read_from_a_url() -> None:
    with http_server(answer_with(200, KEYS)) as url:
        assert JwksUrl(url, Clock(), allow_http=True)() == KEYS


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (answer_with(500, KEYS), FetchOutcome.UNREACHABLE),
        (answer_with(404), FetchOutcome.UNREACHABLE),
        (answer_with(200, b"<html>"), FetchOutcome.MALFORMED),
        (answer_with(200, b" " * (MAX_JWKS_BYTES + 1)), FetchOutcome.TOO_LARGE),
        (answer_with(200, gzip.compress(KEYS), **{"Content-Encoding": "gzip"}), FetchOutcome.MALFORMED),
        (endless, FetchOutcome.TOO_LARGE),
    ],
)
def test_answer_that_gives_no_keys_says_why(
    answer: Callable[[BaseHTTPRequestHandler], None], outcome: FetchOutcome
) -> None:
    with http_server(answer) as url:
        assert outcome_of(url) is outcome


def test_redirect_is_not_followed() -> None:
    with http_server(answer_with(200, KEYS)) as good, http_server(answer_with(302, Location=good)) as url:
        assert outcome_of(url) is FetchOutcome.UNREACHABLE


def test_server_that_is_gone_or_silent_is_unreachable() -> None:
    with http_server(answer_with(200, KEYS)) as url:
        pass
    assert outcome_of(url) is FetchOutcome.UNREACHABLE
    assert outcome_of("http://[") is FetchOutcome.UNREACHABLE
    released = threading.Event()
    with http_server(lambda _: released.wait(10) and None) as url:
        assert outcome_of(url, timeout_s=0.05) is FetchOutcome.UNREACHABLE
        released.set()


def test_body_that_never_ends_is_given_up_in_time() -> None:
    ticks = iter(range(1_000_000))
    with http_server(endless) as url:
        assert outcome_of(url, lambda: next(ticks) * 3.0) is FetchOutcome.UNREACHABLE


@pytest.mark.parametrize(
    "url", ["http://id.example/jwks", "file:///etc/passwd", "jwks.json", "https://", "https://a:b", "https://a\n", ""]
)
def test_url_without_tls_or_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        JwksUrl(url, Clock())


# --- the cache ---


class Source:
    """A JWKS that can fail, and counts how often it is read."""

    def __init__(self, keys: bytes | FetchOutcome = KEYS) -> None:
        self.keys = keys
        self.reads = 0

    def __call__(self) -> bytes:
        self.reads += 1
        if isinstance(self.keys, FetchOutcome):
            raise JwksError(self.keys)
        return self.keys


def cache_of(source: Callable[[], bytes]) -> tuple[KeyCache, Clock, Counter[FetchOutcome]]:
    clock, counts = Clock(), Counter[FetchOutcome]()
    return KeyCache(source, clock, on_fetch=lambda outcome: counts.update([outcome])), clock, counts


def has(cache: KeyCache, key_id: str = "rsa-1") -> bool | AuthReason:
    try:
        return cache.find(key_id, "RS256") is not None
    except TokenRefused as refusal:
        return refusal.reason


def test_keys_are_read_once_until_they_are_old() -> None:
    source = Source()
    cache, clock, counts = cache_of(source)
    assert [has(cache) for _ in range(3)] == [True] * 3
    clock.now = KEYS_TTL_S - 1
    assert has(cache) is True
    assert source.reads == 1
    clock.now = KEYS_TTL_S
    assert has(cache) is True
    assert counts == {FetchOutcome.LOADED: 2}


def test_unknown_key_ids_cause_no_storm_of_reads() -> None:
    source = Source()
    cache, clock, _ = cache_of(source)
    for second in range(100):
        clock.now = float(second)
        assert [has(cache, f"made-up-{index}") for index in range(20)] == [False] * 20
    assert source.reads == 1 + 99 // KEYS_MIN_REFETCH_S


def test_new_key_is_found_once_the_interval_has_passed() -> None:
    source = Source()
    cache, clock, _ = cache_of(source)
    assert has(cache) is True
    source.keys = jwks(RSA_JWK | {"kid": "rsa-2"})
    clock.now = KEYS_MIN_REFETCH_S - 1
    assert has(cache, "rsa-2") is False
    clock.now = KEYS_MIN_REFETCH_S
    assert has(cache, "rsa-2") is True
    assert has(cache, "rsa-1") is False  # withdrawn


def test_failing_source_leaves_the_old_keys_until_they_are_too_old() -> None:
    source = Source()
    cache, clock, counts = cache_of(source)
    assert has(cache) is True
    source.keys = FetchOutcome.UNREACHABLE
    clock.now = KEYS_MAX_AGE_S - 1
    assert has(cache) is True
    assert has(cache, "rsa-2") is AuthReason.KEYS_UNAVAILABLE  # it may have been published meanwhile
    clock.now = KEYS_MAX_AGE_S
    assert has(cache) is AuthReason.KEYS_UNAVAILABLE
    source.keys = KEYS
    clock.now += KEYS_MIN_REFETCH_S
    assert has(cache) is True
    assert counts == {FetchOutcome.LOADED: 2, FetchOutcome.UNREACHABLE: 1}


@pytest.mark.parametrize("bad", [b"<html>", jwks(), jwks(WEAK_JWK), FetchOutcome.UNREACHABLE])
def test_source_that_turns_bad_takes_no_key_away(bad: bytes | FetchOutcome) -> None:
    source = Source()
    cache, clock, _ = cache_of(source)
    cache.refresh_if_due()
    source.keys = bad
    clock.now = KEYS_TTL_S
    cache.refresh_if_due()
    assert source.reads == 2
    assert has(cache) is True


def test_source_that_fails_from_the_start_is_not_hammered() -> None:
    source = Source(FetchOutcome.UNREACHABLE)
    cache, _, counts = cache_of(source)
    assert [has(cache) for _ in range(10)] == [AuthReason.KEYS_UNAVAILABLE] * 10
    assert counts == {FetchOutcome.UNREACHABLE: 1}


def test_nobody_waits_for_a_read_that_another_thread_does() -> None:
    reading, release = threading.Event(), threading.Event()
    source = Source()

    def slow() -> bytes:
        if source.reads:
            reading.set()
            assert release.wait(10)
        return source()

    cache, clock, _ = cache_of(slow)
    assert has(cache) is True
    clock.now = KEYS_TTL_S
    thread = threading.Thread(target=cache.refresh_if_due)
    thread.start()
    assert reading.wait(10)
    assert has(cache) is True
    assert has(cache, "rsa-2") is AuthReason.KEYS_UNAVAILABLE  # not known yet
    release.set()
    thread.join()
    assert has(cache, "rsa-2") is False
    assert source.reads == 2


class KeyCacheWalk(RuleBasedStateMachine):
    """Keys come, go and fail over time, against what the documentation promises."""

    def __init__(self) -> None:
        super().__init__()
        self.source = Source()
        self.published = {"rsa-1"}
        self.cache, self.clock, _ = cache_of(self._read)
        self.read_at: list[float] = []
        self.loaded_at: float | None = None
        self.loaded: set[str] = set()

    def _read(self) -> bytes:
        self.read_at.append(self.clock.now)
        data = self.source()
        self.loaded_at, self.loaded = self.clock.now, set(self.published)
        return data

    @rule(seconds=st.sampled_from([1.0, KEYS_MIN_REFETCH_S, KEYS_TTL_S, KEYS_MAX_AGE_S]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(ids=st.sets(st.sampled_from(["rsa-1", "rsa-2", "rsa-3"]), min_size=1))
    def publish(self, ids: set[str]) -> None:
        self.published = ids
        self.source.keys = jwks(*(RSA_JWK | {"kid": key_id} for key_id in ids))

    @rule()
    def fail(self) -> None:
        self.source.keys = FetchOutcome.UNREACHABLE

    @rule()
    def refresh(self) -> None:
        self.cache.refresh_if_due()

    @rule(key_id=st.sampled_from(["rsa-1", "rsa-2", "rsa-3"]))
    def ask(self, key_id: str) -> None:
        found = has(self.cache, key_id)
        is_fresh = self.loaded_at is not None and self.clock.now - self.loaded_at < KEYS_MAX_AGE_S
        if found is True:
            assert is_fresh
            assert key_id in self.loaded
        elif found is False:
            assert is_fresh
            assert key_id not in self.loaded
        else:
            assert not is_fresh or key_id not in self.loaded

    @invariant()
    def reads_lie_apart(self) -> None:
        gaps = (after - before for before, after in zip(self.read_at, self.read_at[1:], strict=False))
        assert all(gap >= KEYS_MIN_REFETCH_S for gap in gaps)


TestKeyCacheWalk = KeyCacheWalk.TestCase
