"""`zoneserve review` against a service that answers as told: what is sent, written, printed, and never lost."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deployments import review_client as module
from deployments.local import Endpoint
from deployments.review_client import ReviewClientError, read_files, review_files, sample_files

ORIGINS = {"shared": 100, "decode_cache": 60, "prefill_cache": 0, "prefill_computed": 30, "decode_computed": 10}
Answer = Callable[[dict[str, Any]], tuple[int, list[object]]]


def review_of(
    name: str, *flags: tuple[str, list[int]], abstained: bool = False, tells_reuse: bool = True
) -> dict[str, Any]:
    stem = re.sub(r"\W", "-", name)
    reuse = {"prompt_tokens_by_origin": ORIGINS, "pushed_bytes": 2_000_000}
    return {
        "type": "review",
        "file_stem": stem,
        "review": {
            "claim_id": name,
            "risk_category": "high" if flags else "none",
            "recommended_action": "pend" if flags else "pay",
            "flags": [{"code": code, "lines": lines} for code, lines in flags],
            "abstained": abstained,
            "narrative_ref": f"{stem}.md",
        },
        "narrative_md": f"# {name}\n",
        "serving": {
            "prompt_tokens": 0 if abstained else 200,
            "ttft_s": None if abstained else 0.25,
            **(reuse if tells_reuse and not abstained else {}),
        },
    }


def refused(name: str, reason: str) -> dict[str, Any]:
    disposition = {"file": name, "outcome": "refused", "reason": reason, "segment_number": 8, "detail": "It is cut."}
    return {"type": "disposition", "disposition": disposition}


def whole(*events: dict[str, Any]) -> tuple[int, list[object]]:
    num_claims = sum(event["type"] == "review" for event in events)
    return 200, [
        {"type": "accepted", "num_claims": num_claims, "num_files": 1},
        *events,
        {"type": "done", "num_reviews": num_claims},
        "[DONE]",
    ]


def one_review_a_file(body: dict[str, Any]) -> tuple[int, list[object]]:
    return whole(*(review_of(file["name"].removesuffix(".edi")) for file in body["files"]))


class Service:
    """Answers `POST /v1/reviews` with what `answer` makes of the body, and keeps the bodies."""

    def __init__(self) -> None:
        self.answer: Answer = one_review_a_file
        self.calls: list[list[str]] = []
        self.keys: set[str | None] = set()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.calls.append([file["name"] for file in body["files"]])
                service.keys.add(self.headers["Authorization"])
                status, events = service.answer(body)
                self.send_response(status)
                self.end_headers()
                for event in events:
                    if status == 200:
                        text = event if isinstance(event, str) else json.dumps(event)
                        self.wfile.write(f"data: {text}\n\n".encode())
                    else:
                        self.wfile.write(json.dumps(event).encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = Endpoint(f"http://127.0.0.1:{self.server.server_port}", "the-key")


@pytest.fixture
def service() -> Iterator[Service]:
    running = Service()
    thread = threading.Thread(target=running.server.serve_forever, args=(0.01,))
    thread.start()
    yield running
    running.server.shutdown()
    running.server.server_close()
    thread.join()


class Run:
    """One `review_files` and what it printed."""

    def __init__(self, service: Service, folder: Path, names: list[str], size: int = 3) -> None:
        self.out_dir = folder / "out"
        paths = [folder / name for name in names]
        for path in paths:
            path.write_bytes(b"x" * size)
        console = Console(width=160, force_terminal=False)
        with console.capture() as capture:
            self.is_complete = review_files(read_files(paths), service.endpoint, self.out_dir, console)
        self.text = capture.get()

    def row(self, name: str) -> str:
        (line,) = [line for line in self.text.splitlines() if name in line and "│" in line]
        return line.split("│")[2].strip()

    @property
    def written(self) -> set[str]:
        return {path.name for path in self.out_dir.iterdir()}


def test_each_claim_has_its_line_and_its_two_files(service: Service, tmp_path: Path) -> None:
    service.answer = lambda body: whole(
        review_of("CLAIM-1", ("duplicate_line", [1, 3]), ("charge_total_mismatch", [])), review_of("CLAIM-2")
    )
    run = Run(service, tmp_path, ["a.edi"])
    assert run.is_complete
    assert service.keys == {"Bearer the-key"}
    (line,) = [line for line in run.text.splitlines() if line.startswith("CLAIM-1")]
    *cells, duplicate, total = line.split()
    assert cells == ["CLAIM-1", "high", "pend", "0.25", "s", "200:", "100/60/0/30/10"]
    assert (duplicate, total) == ("duplicate_line(1,3),", "charge_total_mismatch")
    assert run.written == {"CLAIM-1.json", "CLAIM-1.md", "CLAIM-2.json", "CLAIM-2.md"}
    assert json.loads((run.out_dir / "CLAIM-1.json").read_text())["claim_id"] == "CLAIM-1"
    assert (run.out_dir / "CLAIM-2.md").read_text() == "# CLAIM-2\n"


def test_the_summary_adds_up(service: Service, tmp_path: Path) -> None:
    service.answer = lambda body: whole(
        review_of("A"), review_of("B"), review_of("C", ("x", [1]), abstained=True), refused("a.edi", "truncated")
    )
    run = Run(service, tmp_path, ["a.edi"])
    assert run.row("claims reviewed") == "3"
    assert run.row("by rules alone") == "1"
    assert run.row("inputs refused") == "1"
    assert run.row("actions") == "pay 2, pend 1"
    assert run.row("prompt tokens  ") == "400"
    assert run.row("of shared text") == "200 (50 %)"
    assert run.row("cached on decode") == "120 (30 %)"
    assert run.row("computed on prefill") == "60 (15 %)"
    assert run.row("KV pushed") == "4.0 MB"


def test_a_service_that_does_not_tell_of_reuse_has_a_whole_summary_without_it(service: Service, tmp_path: Path) -> None:
    service.answer = lambda body: whole(review_of("A", tells_reuse=False), review_of("B", tells_reuse=False))
    run = Run(service, tmp_path, ["a.edi"])
    assert run.is_complete
    (line,) = [line for line in run.text.splitlines() if line.startswith("A ")]
    assert line.split() == ["A", "none", "pay", "0.25", "s", "200", "-"]
    assert run.row("claims reviewed") == "2"
    assert run.row("prompt tokens") == "400"
    assert run.row("TTFT") == "0.25 s / 0.25 s"
    assert not [word for word in ("cached on", "KV pushed", "%") if word in run.text.partition("summary")[2]]


def test_a_refused_input_is_named_and_the_run_is_not_complete(service: Service, tmp_path: Path) -> None:
    service.answer = lambda body: whole(refused("a.edi", "truncated"), review_of("B"))
    run = Run(service, tmp_path, ["a.edi", "b.edi"])
    assert not run.is_complete
    assert "a.edi: refused (truncated) segment number 8 It is cut." in run.text


def test_many_files_go_in_several_calls_and_each_in_one(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_FILES_IN_CALL", 2)
    names = [f"{index}.edi" for index in range(5)]
    run = Run(service, tmp_path, names)
    assert service.calls == [names[:2], names[2:4], names[4:]]
    assert run.row("claims reviewed") == "5"


def test_large_files_go_in_several_calls(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CALL_BYTES", 100)  # 30 bytes are 40 in base64
    Run(service, tmp_path, ["a.edi", "b.edi", "c.edi"], size=30)
    assert service.calls == [["a.edi", "b.edi"], ["c.edi"]]


def test_a_file_too_large_for_the_service_is_refused_alone(service: Service, tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, list[object]]:
        if any(file["name"] == "big.edi" for file in body["files"]):
            return 413, [{"error": {"message": "the body is larger than 9 bytes"}}]
        return one_review_a_file(body)

    service.answer = answer
    run = Run(service, tmp_path, ["a.edi", "big.edi", "c.edi"])
    assert not run.is_complete
    assert run.written == {"a.json", "a.md", "c.json", "c.md"}
    assert "big.edi: refused (file_too_large)" in run.text
    assert "the body is larger than 9 bytes" in run.text


def test_two_calls_that_give_one_name_overwrite_nothing(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_FILES_IN_CALL", 1)
    service.answer = lambda body: whole(review_of("SAME"))
    run = Run(service, tmp_path, ["a.edi", "b.edi"])
    assert run.written == {"SAME.json", "SAME.md", "SAME-2.json", "SAME-2.md"}
    assert json.loads((run.out_dir / "SAME-2.json").read_text())["narrative_ref"] == "SAME-2.md"


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ((401, [{"error": {"message": "a valid bearer key is required"}}]), "401.*bearer key"),
        ((500, ["<html>"]), r"\(500\)"),
        ((200, [{"type": "accepted", "num_claims": 1, "num_files": 1}]), "ended early"),
        ((200, [{"error": {"message": "internal error"}}, "[DONE]"]), "internal error"),
        ((200, ["<html>"]), "something else than reviews"),
    ],
)
def test_a_service_that_fails_is_an_error_in_one_sentence(
    answer: tuple[int, list[object]], fault: str, service: Service, tmp_path: Path
) -> None:
    service.answer = lambda body: answer
    with pytest.raises(ReviewClientError, match=fault) as error:
        Run(service, tmp_path, ["a.edi"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://[::1", "nowhere"])
def test_an_address_where_no_service_answers_is_named(url: str, tmp_path: Path) -> None:
    (tmp_path / "a.edi").write_bytes(b"x")
    with pytest.raises(ReviewClientError, match=re.escape(url)) as error:
        review_files(read_files([tmp_path / "a.edi"]), Endpoint(url, "the-key"), tmp_path / "out", Console(quiet=True))
    assert "the-key" not in str(error.value)


def test_a_place_that_cannot_be_written_is_named(service: Service, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ReviewClientError, match="out: File exists"):
        Run(service, tmp_path, ["a.edi"])


def test_a_huge_file_is_named_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 10)
    (tmp_path / "huge.edi").write_bytes(b"y" * 11)
    (tmp_path / "full.edi").write_bytes(b"y" * 10)
    (file,) = read_files([tmp_path / "full.edi"])
    assert base64.b64decode(file["content_base64"]) == b"y" * 10
    with pytest.raises(ReviewClientError, match=r"huge\.edi: larger than 10 bytes"):
        read_files([tmp_path / "huge.edi"])


def test_the_samples_are_there() -> None:
    assert len(sample_files()) >= 10
