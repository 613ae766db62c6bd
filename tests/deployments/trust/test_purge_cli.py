"""`zoneserve zone purge` and its receipts against a service over real HTTP; `rotate-key` on a real file."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from deployments.trust import purge_client
from deployments.trust.epochs import EpochStore
from deployments.trust.keyring import Keyring, key_id, read_keyring
from deployments.trust.purge import PurgeRequest, PurgeService, purgeable_zone
from deployments.trust.receipts import MAX_RECEIPT_BYTES, Outcome, ReceiptSigner, ReplicaPurge, SignedReceipt
from deployments.trust.zone_cli import zone_app
from tests.deployments.trust.test_purge import BAD_PATHS

GOLD = "tenant/acme/plan/gold"
RING = Keyring((b"k" * 32,))
BEARER = "zs-a-key"


class Service:
    """The purge service on a port of its own; `answer` stands in for it where a test says so."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str | None, dict[str, Any]]] = []
        self.outcome = Outcome.PURGED
        self.keyring = RING
        self.answer: tuple[int, bytes] | None = None
        self.url = ""

    def reply(self, body: dict[str, Any]) -> tuple[int, bytes]:
        if self.answer is not None:
            return self.answer
        zone = purgeable_zone(PurgeRequest.model_validate(body).zone)
        return 200, asyncio.run(self._purge().purge(zone, "ann")).data

    def _purge(self) -> PurgeService:
        async def pool(path: str, epoch: int) -> list[ReplicaPurge]:
            return [ReplicaPurge(replica="d1", outcome=self.outcome, num_findable=17, num_scrubbed=23)]

        async def record(signed: SignedReceipt) -> None:
            pass

        return PurgeService(EpochStore(None), ReceiptSigner(self.keyring), {"decode": pool}, record)


@pytest.fixture
def service() -> Iterator[Service]:
    served = Service()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.requests.append((self.path, self.headers["Authorization"], body))
            status, data = served.reply(body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        served.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()


class Desk:
    """The CLI with the files it needs."""

    def __init__(self, folder: Path, service: Service) -> None:
        self.folder, self.service = folder, service
        self.bearer, self.master = folder / "bearer", folder / "master.key"
        self.bearer.write_text(BEARER + "\n")
        self.master.write_text(RING.current.hex())
        self.public = folder / "receipt.pub"
        printed = self.run("receipt-key", "--master-key-file", str(self.master))
        assert printed.exit_code == 0
        self.public.write_text(printed.stdout)

    def run(self, *arguments: str) -> Result:
        return CliRunner(env={"COLUMNS": "200", "ZONESERVE_MASTER_KEY": ""}).invoke(zone_app, list(arguments))

    def purge(self, zone: str = GOLD, *more: str, key: bool = True) -> Result:
        receipt_key = ("--receipt-key", str(self.public)) if key else ()
        return self.run(
            "purge", *more, "--url", self.service.url, "--key-file", str(self.bearer), *receipt_key, "--", zone
        )


@pytest.fixture
def desk(tmp_path: Path, service: Service) -> Desk:
    return Desk(tmp_path, service)


def test_purge_asks_the_service_and_shows_what_each_replica_did(desk: Desk) -> None:
    done = desk.purge()
    assert done.exit_code == 0, done.output
    assert desk.service.requests == [("/v1/zones/purge", f"Bearer {BEARER}", {"zone": GOLD})]
    row = next(line for line in done.stdout.splitlines() if "d1" in line)
    assert {"decode", "purged", "17", "23"} <= set(row.replace("│", " ").split())
    assert f"{GOLD}, epoch 1" in done.stdout
    assert "by ann" in done.stdout
    assert done.stdout.splitlines()[-1] == "complete"
    assert BEARER not in done.output


def test_incomplete_purge_is_said_and_is_exit_status_1(desk: Desk) -> None:
    desk.service.outcome = Outcome.SILENT
    done = desk.purge()
    assert done.exit_code == 1
    assert "INCOMPLETE" in done.stdout
    assert "silent" in done.stdout


def test_receipt_is_kept_and_can_be_checked_later(desk: Desk) -> None:
    kept = desk.folder / "receipts" / "gold.json"
    assert desk.purge(GOLD, "--out", str(kept)).exit_code == 0
    for key in (("--receipt-key", str(desk.public)), ("--master-key-file", str(desk.master))):
        checked = desk.run("check-receipt", str(kept), *key)
        assert checked.exit_code == 0, checked.output
        assert f"{GOLD}, epoch 1" in checked.stdout
    kept.write_bytes(kept.read_bytes().replace(b'"epoch":1', b'"epoch":2'))
    forged = desk.run("check-receipt", str(kept), "--receipt-key", str(desk.public))
    assert forged.exit_code == 1
    assert "signature does not hold" in forged.stderr
    assert desk.run("check-receipt", str(kept)).exit_code == 1  # no key at all


def test_kept_receipt_of_an_incomplete_purge_is_no_success(desk: Desk) -> None:
    desk.service.outcome = Outcome.FAILED
    kept = desk.folder / "gold.json"
    assert desk.purge(GOLD, "--out", str(kept)).exit_code == 1
    checked = desk.run("check-receipt", str(kept), "--receipt-key", str(desk.public))
    assert checked.exit_code == 1
    assert "INCOMPLETE" in checked.stdout


def test_file_that_exists_is_neither_overwritten_nor_is_anything_purged(desk: Desk) -> None:
    kept = desk.folder / "gold.json"
    kept.write_text("mine")
    assert desk.purge(GOLD, "--out", str(kept)).exit_code == 1
    assert (kept.read_text(), desk.service.requests) == ("mine", [])


def test_receipt_of_another_key_is_not_believed_nor_kept(desk: Desk) -> None:
    desk.service.keyring = Keyring((b"x" * 32,))
    kept = desk.folder / "gold.json"
    refused = desk.purge(GOLD, "--out", str(kept))
    assert refused.exit_code == 1
    assert "not among" in refused.stderr
    assert not kept.exists()
    unverified = desk.purge(key=False)
    assert unverified.exit_code == 0
    assert "not verified" in unverified.stdout


def test_receipt_of_another_zone_is_not_believed(desk: Desk) -> None:
    desk.service.answer = desk.service.reply({"zone": "tenant/acme/plan/other"})
    refused = desk.purge()
    assert refused.exit_code == 1
    assert "another zone" in refused.stderr


@pytest.mark.parametrize("zone", BAD_PATHS)
def test_zone_that_is_none_is_refused_before_anything_is_sent(desk: Desk, zone: str) -> None:
    refused = desk.purge(zone)
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: ")
    assert len(refused.stderr) < 120
    assert desk.service.requests == []


@pytest.mark.parametrize(
    ("status", "data", "said"),
    [
        (403, b'{"error": {"message": "you may not \\u001b[2J this"}}', "(403): you may not ?[2J this"),
        (503, b'{"error": {"message": "' + b"x" * 10_000 + b'"}}', "(503): xxx"),
        (500, b"<html>", "refused the purge (500)"),
        (404, b'{"error": "none"}', "refused the purge (404)"),
        (307, b"", "refused the purge (307)"),
        (200, b"", "not a receipt"),
        (200, b'{"receipt": {}}', "not a receipt"),
        (200, b" " * (MAX_RECEIPT_BYTES + 1), "too long"),
    ],
)
def test_service_that_gives_no_receipt_is_one_line_and_exit_status_1(
    desk: Desk, status: int, data: bytes, said: str
) -> None:
    desk.service.answer = (status, data)
    refused = desk.purge()
    assert refused.exit_code == 1
    assert said in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert len(refused.stderr) < 400


@pytest.mark.parametrize("content", ["", "two words", "zs-ключ", "x" * 600, "a\nb"])
def test_file_without_a_bearer_key_sends_nothing(desk: Desk, content: str) -> None:
    desk.bearer.write_text(content)
    refused = desk.purge()
    assert refused.exit_code == 1
    assert "not a bearer key" in refused.stderr
    assert desk.service.requests == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nowhere", "ftp://x", "http://[", ""])
def test_deployment_that_is_not_there_is_one_line(desk: Desk, url: str) -> None:
    desk.service.url = url
    refused = desk.purge()
    assert refused.exit_code == 1
    assert "no answer from the service" in refused.stderr


def test_public_keys_are_all_that_receipt_key_prints(desk: Desk) -> None:
    assert RING.current.hex() not in desk.public.read_text()
    desk.run("rotate-key", str(desk.master))
    printed = desk.run("receipt-key", "--master-key-file", str(desk.master)).stdout.splitlines()
    assert len(printed) == 2
    assert printed[1] == desk.public.read_text().strip()


def test_rotation_shows_ids_and_never_a_key(desk: Desk) -> None:
    done = desk.run("rotate-key", str(desk.master))
    assert done.exit_code == 0, done.output
    ring = read_keyring(desk.master)
    assert ring.keys[1:] == RING.keys
    assert key_id(ring.current) in done.stdout
    assert key_id(RING.current) in done.stdout
    assert not any(key.hex() in done.output for key in ring.keys)
    dropped = desk.run("rotate-key", str(desk.master), "--keep", "1")
    assert "dropped" in dropped.stdout
    assert desk.run("rotate-key", str(desk.master), "--keep", "0").exit_code == 2
    assert desk.run("rotate-key", str(desk.folder / "none")).exit_code == 1


def test_a_slow_service_is_given_up(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(purge_client, "PURGE_TIMEOUT_S", 0.0)
    refused = desk.purge()
    assert refused.exit_code == 1
    assert "no answer from the service" in refused.stderr
