"""`zoneserve audit verify | show | export | replay`."""

from __future__ import annotations

import datetime as dt
import json
import os
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deployments.trust.audit.chain import CHAIN_KEY_INFO, Head, Record
from deployments.trust.audit.files import AuditDirectory, AuditError
from deployments.trust.audit.verify import Verification, merged, verify
from deployments.trust.key_files import KeyFileError
from deployments.trust.keyring import read_keyring

audit_app = typer.Typer(no_args_is_help=True, help="The audit log: verify, show, export, and reviews replayed.")
out = Console()
err = Console(stderr=True)

DirectoryArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The directory of the logs.")]
KeyOption = Annotated[
    Path, typer.Option("--master-key-file", help="The deployment's master keys; each log is read under its own.")
]
AnchorOption = Annotated[
    list[str] | None,
    typer.Option("--anchor", metavar="SEQ:HASH", help="A head kept elsewhere, as `show` prints it; repeatable."),
]


@audit_app.command("verify")
def verify_command(directory: DirectoryArgument, master_key_file: KeyOption, anchor: AnchorOption = None) -> None:
    """Find edits, drops, reorderings, splices and truncations; exit status 1 where there is one."""
    with _opened(directory, master_key_file, anchor) as (_, result):
        _print_result(result)
    raise typer.Exit(0 if result.is_intact else 1)


@audit_app.command()
def show(
    directory: DirectoryArgument,
    master_key_file: KeyOption,
    *,
    event: Annotated[str, typer.Option(help="Kinds of events; * stands for anything.")] = "*",
    zone: Annotated[str | None, typer.Option(help="Zones, for example 'tenant/acme/*'.")] = None,
    since: Annotated[dt.datetime | None, typer.Option(help="From this time on, UTC.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="The last so many.")] = 100,
) -> None:
    """Show the last records as a table, then every log's head, which is what `--anchor` takes."""
    since_ms = 0 if since is None else int(since.replace(tzinfo=dt.UTC).timestamp() * 1000)
    with _opened(directory, master_key_file) as (logs, result):
        chosen = (
            record
            for record in merged(logs, result)
            if record.time_ms >= since_ms
            and fnmatchcase(record.event, event)
            and (zone is None or fnmatchcase(str(record.fields.get("zone", "")), zone))
        )
        out.print(_table(deque(chosen, maxlen=limit)))
        _print_result(result)
    raise typer.Exit(0 if result.is_intact else 1)


@audit_app.command()
def export(
    directory: DirectoryArgument,
    master_key_file: KeyOption,
    out_file: Annotated[Path, typer.Option("--out", metavar="FILE", help="Made anew; one that exists is not touched.")],
    anchor: AnchorOption = None,
) -> None:
    """Write all logs as one file by time: the result of the verification on its first line, then a record a line."""
    with _opened(directory, master_key_file, anchor) as (logs, result):
        try:
            opened = os.open(out_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with os.fdopen(opened, "wb") as file:
                file.write(json.dumps({"verification": _as_json(result)}, sort_keys=True).encode() + b"\n")
                file.writelines(record.line() for record in merged(logs, result))
        except OSError as error:
            raise AuditError(f"{out_file}: {error.strerror or error}") from error
        out.print(f"{out_file}: {result.num_records} records", highlight=False, soft_wrap=True, markup=False)
        _print_result(result)
    raise typer.Exit(0 if result.is_intact else 1)


@audit_app.command()
def replay(
    review_id: Annotated[str, typer.Argument(metavar="REVIEW_ID", help="As the review and its record have it.")],
    *,
    directory: Annotated[Path, typer.Option("--dir", help="The directory of the deployment's audit logs.")],
    master_key_file: KeyOption,
    claim: Annotated[
        list[Path],
        typer.Option("--claim", metavar="FILE", help="The claim file as it was submitted; repeat it as the call had."),
    ],
    url: Annotated[str, typer.Option(help="The deployment that does the review again.")],
    key_file: Annotated[Path, typer.Option("--key-file", help="Bearer key of the tenant whose review it is.")],
    review: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The stored review (JSON): tells the first field that differs.")
    ] = None,
    record: Annotated[
        str | None, typer.Option(metavar="LOG:SEQ", help="Which record of the review counts; else the oldest.")
    ] = None,
) -> None:
    """Do a review again and hold it against its audit record.

    What a member's earlier claims in the same call said is part of a review: give the whole file, or all files in
    their order, as they were submitted, not the one claim. Every claim in them is reviewed again, and each of these
    reviews is audited as any is.

    Two runs can be compared where model, arithmetic, policy, manifests, schema, rules, plan and token limit are the
    same. No content is shown. Exit status: 0 identical, 1 different, 2 not comparable (a broken chain, no such record,
    another claim, other conditions, no answer).
    """
    from deployments.local import Endpoint
    from deployments.review_client import ReviewClientError, read_files
    from deployments.trust import replay as replaying

    try:
        chosen = None if record is None else replaying.RecordName.parse(record)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--record") from error
    try:
        keyring = read_keyring(master_key_file)
        result = replaying.replay(
            review_id,
            reviews=replaying.AuditedReviews(directory, keyring),
            keyring=keyring,
            files=read_files(claim),
            endpoint=Endpoint(url.rstrip("/"), replaying.read_bearer_key(key_file)),
            record=chosen,
            stored=None if review is None else replaying.read_review(review),
        )
    except (replaying.NotComparable, ReviewClientError, AuditError, KeyFileError) as error:
        _say(err, f"not comparable: {error}")
        raise typer.Exit(2) from error
    for line in replaying.lines(result):
        _say(out, line)
    raise typer.Exit(0 if result.is_identical else 1)


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True, markup=False)


@contextmanager
def _opened(
    path: Path, master_key_file: Path, anchors: list[str] | None = None
) -> Iterator[tuple[AuditDirectory, Verification]]:
    """The directory and its verification; errors become one line and exit status 1."""
    try:
        known = [Head.parse(text) for text in anchors or ()]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--anchor") from error
    try:
        keys = read_keyring(master_key_file).derive(CHAIN_KEY_INFO)
        with closing(AuditDirectory(path)) as directory:
            result = verify(directory, keys, known)
            if not result.streams:
                raise AuditError(f"{path}: no audit log here")
            yield directory, result
    except (AuditError, KeyFileError) as error:
        err.print("[bold red]error:[/] " + str(error).replace("[", r"\["), highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def _table(records: deque[Record]) -> Table:
    table = Table()
    for name in ("time (UTC)", "log", "seq", "event", "fields"):
        table.add_column(name, overflow="fold")
    for record in records:
        # Pieces of Text: what a forged record says is shown and never obeyed.
        fields = " ".join(f"{name}={value}" for name, value in record.fields.items())
        table.add_row(_utc(record.time_ms), Text(record.stream), str(record.seq), Text(record.event), Text(fields))
    return table


def _utc(time_ms: int) -> str:
    try:
        return dt.datetime.fromtimestamp(time_ms / 1000, dt.UTC).isoformat(" ", "milliseconds").removesuffix("+00:00")
    except (ValueError, OverflowError, OSError):
        return str(time_ms)


def _print_result(result: Verification) -> None:
    for stream in result.streams:
        out.print(
            f"{stream.stream}: {stream.num_records} records in {stream.num_files} files, head {stream.head}",
            highlight=False, soft_wrap=True, markup=False,
        )  # fmt: skip
    num_findings = result.counts.total()
    if num_findings:
        table = Table("fault", "log", "file", "line", "record", "what")
        for finding in result.findings:
            where = (Text(finding.stream), Text(finding.file), str(finding.line or ""), str(finding.seq or ""))
            table.add_row(finding.fault.value, *where, Text(finding.what))
        out.print(table)
        counts = ", ".join(f"{count} {fault.value}" for fault, count in sorted(result.counts.items(), key=_by_name))
        shown = f"; the first {len(result.findings)} are shown" if num_findings > len(result.findings) else ""
        out.print(f"[bold red]not intact[/]: {counts}{shown}", highlight=False, soft_wrap=True)
    else:
        out.print(f"intact: {result.num_records} records", highlight=False)


def _by_name(item: tuple[object, int]) -> str:
    return str(item[0])


def _as_json(result: Verification) -> dict[str, object]:
    return {
        "is_intact": result.is_intact,
        "num_records": result.num_records,
        "counts": {fault.value: count for fault, count in result.counts.items()},
        "findings": [
            {"fault": f.fault.value, "log": f.stream, "file": f.file, "line": f.line, "seq": f.seq, "what": f.what}
            for f in result.findings
        ],
        "logs": [
            {"log": s.stream, "num_records": s.num_records, "first_seq": s.first_seq, "head": str(s.head)}
            for s in result.streams
        ],
    }
