"""The CLI's side of a review: send files, show progress, write what comes back."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from deployments.local import Endpoint

SAMPLES = Path(__file__).parent / "claims" / "samples"
REVIEW_TIMEOUT_S = 600.0
MAX_FILES_IN_CALL = 100
MAX_CALL_BYTES = 3 << 20  # of base64; the service takes bodies of 4 MiB
MAX_FILE_BYTES = 64 << 20  # far above what any service takes; a larger file is not read at all
RISK_STYLE = {"none": "green", "low": "green", "medium": "yellow", "high": "red", "critical": "bold red"}
ORIGIN_NAMES = {
    "shared": "of shared text",
    "decode_cache": "cached on decode",
    "prefill_cache": "cached on prefill",
    "prefill_computed": "computed on prefill",
    "decode_computed": "computed on decode",
}


EncodedFile = dict[str, str]


class ReviewClientError(Exception):
    """The reviews could not be had; the message says why."""


class _CallTooLarge(ReviewClientError):
    """The service takes smaller bodies; nothing of the call was read."""


@dataclass(slots=True)
class _Tally:
    """What the summary reports."""

    num_reviews: int = 0
    num_abstained: int = 0
    num_refused: int = 0
    actions: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    origins: Counter[str] = field(default_factory=Counter)
    pushed_bytes: int = 0
    ttfts_s: list[float] = field(default_factory=list)
    names: set[str] = field(default_factory=set)


def sample_files() -> list[Path]:
    """The synthetic claims that ship with the package."""
    return sorted(SAMPLES.glob("*.edi"))


def read_files(files: list[Path]) -> list[EncodedFile]:
    """Read all files before anything is started.

    Raises:
        ReviewClientError: One cannot be read, or is far too large.
    """
    return [_encoded(path) for path in files]


def review_files(files: list[EncodedFile], endpoint: Endpoint, out_dir: Path, out: Console) -> bool:
    """Review all claims of `files`; True when every one was reviewed.

    A file too large for the service is refused alone; the others are reviewed.

    Raises:
        ReviewClientError: The service refused the call, its answer ended early, or a review cannot be written.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        return _review(files, endpoint, out_dir, out)
    except OSError as error:
        raise ReviewClientError(f"{error.filename or out_dir}: {error.strerror or error}") from error


def _review(files: list[EncodedFile], endpoint: Endpoint, out_dir: Path, out: Console) -> bool:
    tally = _Tally()
    columns = (
        SpinnerColumn(),
        TextColumn("reviewing claims"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=out, transient=True) as progress:
        task = progress.add_task("claims", total=None)
        origins = f"prompt tokens: all, and where the service says so {' / '.join(ORIGIN_NAMES.values())}"
        out.print(origins, style="dim", soft_wrap=True)
        out.print(_line("claim", "risk", "action", "TTFT", "prompt tokens", "flags"), style="bold", soft_wrap=True)
        num_claims = 0
        for event in _events(files, endpoint):
            match event["type"]:
                case "accepted":
                    num_claims += event["num_claims"]
                    progress.update(task, total=num_claims)
                case "disposition":
                    _take_disposition(event["disposition"], tally, out)
                case "review":
                    _take_review(event, tally, out_dir, out)
                    progress.advance(task)
    _print_summary(tally, out_dir, out)
    return tally.num_refused == 0 and tally.num_reviews > 0


def _events(files: list[EncodedFile], endpoint: Endpoint) -> Iterator[dict[str, Any]]:
    for batch in _batches(files):
        try:
            yield from submit(batch, endpoint)
        except _CallTooLarge as error:
            if len(batch) > 1:
                for file in batch:
                    yield from _events([file], endpoint)
            else:
                yield {"type": "disposition", "disposition": _too_large(batch[0], str(error))}


def _too_large(file: EncodedFile, detail: str) -> dict[str, Any]:
    return {"file": file["name"], "outcome": "refused", "reason": "file_too_large", "detail": detail}


def _batches(files: list[EncodedFile]) -> Iterator[list[EncodedFile]]:
    """Files in order, as many in a call as the service takes. A member's history does not reach across calls."""
    batch: list[EncodedFile] = []
    size = 0
    for file in files:
        if batch and (len(batch) == MAX_FILES_IN_CALL or size + len(file["content_base64"]) > MAX_CALL_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(file)
        size += len(file["content_base64"])
    if batch:
        yield batch


def submit(files: list[EncodedFile], endpoint: Endpoint, *, plan: str | None = None) -> Iterator[dict[str, Any]]:
    """The events of one call, as they come. `plan` None: the service's own choice.

    Raises:
        ReviewClientError: The service refused the call, does not answer, or its answer ended early.
    """
    headers = {"Authorization": f"Bearer {endpoint.key}"}
    body: dict[str, Any] = {"stream": True, "files": files} | ({} if plan is None else {"plan": plan})
    is_done = False
    try:
        with httpx.stream(
            "POST", f"{endpoint.url}/v1/reviews", json=body, headers=headers, timeout=REVIEW_TIMEOUT_S
        ) as response:
            if response.status_code != httpx.codes.OK:
                kind = (
                    _CallTooLarge if response.status_code == httpx.codes.REQUEST_ENTITY_TOO_LARGE else ReviewClientError
                )
                raise kind(_refusal(response.read(), response.status_code))
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise ReviewClientError(event["error"]["message"])
                    is_done = event["type"] == "done"
                    yield event
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ReviewClientError(f"{endpoint.url} does not answer: {error}") from error
    except ValueError:
        raise ReviewClientError(f"{endpoint.url} answers something else than reviews") from None
    if not is_done:
        raise ReviewClientError("the answer ended early")


def _encoded(path: Path) -> EncodedFile:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ReviewClientError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
        return {"name": path.name, "content_base64": base64.b64encode(path.read_bytes()).decode()}
    except OSError as error:
        raise ReviewClientError(f"{path}: {error.strerror or error}") from error


def _refusal(body: bytes, status: int) -> str:
    try:
        return f"the service refused the files ({status}): {json.loads(body)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"the service refused the files ({status})"


def _take_disposition(disposition: dict[str, Any], tally: _Tally, out: Console) -> None:
    where = [
        f"{name.replace('_', ' ')} {disposition[name]}"
        for name in ("claim_id", "segment_number", "segment_id", "line_number")
        if disposition.get(name) is not None
    ]
    is_refusal = disposition["outcome"] == "refused"
    tally.num_refused += is_refusal
    style = "red" if is_refusal else "dim"
    out.print(
        " ".join(
            [
                f"{disposition['file']}: {disposition['outcome']} ({disposition['reason']})",
                *where,
                disposition["detail"],
            ]
        ),
        style=style,
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _take_review(event: dict[str, Any], tally: _Tally, out_dir: Path, out: Console) -> None:
    name = _own_name(event["file_stem"], tally.names)
    review, serving = event["review"] | {"narrative_ref": f"{name}.md"}, event["serving"]
    (out_dir / f"{name}.json").write_text(json.dumps(review, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (out_dir / f"{name}.md").write_text(event["narrative_md"], encoding="utf-8")
    by_origin = serving.get("prompt_tokens_by_origin")
    origins = None if by_origin is None else [by_origin.get(key, 0) for key in ORIGIN_NAMES]
    tally.num_reviews += 1
    tally.num_abstained += bool(review["abstained"])
    tally.actions[review["recommended_action"]] += 1
    tally.prompt_tokens += serving["prompt_tokens"]
    tally.origins.update(by_origin or {})
    tally.pushed_bytes += serving.get("pushed_bytes", 0)
    if serving["ttft_s"] is not None:
        tally.ttfts_s.append(serving["ttft_s"])
    flags = ", ".join(_flag(flag["code"], flag["lines"]) for flag in review["flags"]) or "-"
    ttft = "-" if serving["ttft_s"] is None else f"{serving['ttft_s']:.2f} s"
    counts = str(serving["prompt_tokens"]) + ("" if origins is None else f": {'/'.join(map(str, origins))}")
    risk = review["risk_category"]
    line = _line(review["claim_id"], risk, review["recommended_action"], ttft, counts, flags)
    out.print(line, style=RISK_STYLE.get(risk), markup=False, highlight=False, soft_wrap=True)


def _own_name(stem: str, names: set[str]) -> str:
    """Names are distinct within a call; two calls of one run may give the same."""
    name, count = stem, 1
    while name in names:
        count += 1
        name = f"{stem}-{count}"
    names.add(name)
    return name


def _flag(code: str, lines: list[int]) -> str:
    """A flag without lines is one of the whole claim."""
    return f"{code}({','.join(map(str, lines))})" if lines else code


def _line(*cells: str) -> str:
    claim, risk, action, ttft, origins, flags = cells
    return f"{claim:<18} {risk:<9} {action:<16} {ttft:>8}  {origins:<24} {flags}"


def _print_summary(tally: _Tally, out_dir: Path, out: Console) -> None:
    table = Table(show_header=False, title="summary")
    table.add_row("claims reviewed", str(tally.num_reviews))
    table.add_row("of them by rules alone", str(tally.num_abstained))
    table.add_row("inputs refused", str(tally.num_refused))
    table.add_row("actions", ", ".join(f"{action} {count}" for action, count in tally.actions.most_common()))
    if tally.ttfts_s:
        ordered = sorted(tally.ttfts_s)
        table.add_row("TTFT median / worst", f"{ordered[len(ordered) // 2]:.2f} s / {ordered[-1]:.2f} s")
    table.add_row("prompt tokens", str(tally.prompt_tokens))
    if tally.origins:  # the service tells them only where trust.report_cached_tokens says so
        total = max(tally.origins.total(), 1)
        for origin, name in ORIGIN_NAMES.items():
            count = tally.origins[origin]
            table.add_row(f"prompt tokens {name}", f"{count} ({100 * count / total:.0f} %)")
        table.add_row("KV pushed from prefill to decode", f"{tally.pushed_bytes / 1e6:.1f} MB")
    table.add_row("written to", str(out_dir))
    out.print(table)
