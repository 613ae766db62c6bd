"""`zoneserve audit verify | show | export`."""

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

from deployments.trust.audit.chain import Head, Record, chain_key
from deployments.trust.audit.files import AuditDirectory, AuditError
from deployments.trust.audit.verify import Verification, merged, verify
from deployments.trust.key_files import KeyFileError
from deployments.trust.principals import read_master_key

audit_app = typer.Typer(no_args_is_help=True, help="The audit log: verify, show, export.")
out = Console()
err = Console(stderr=True)

DirectoryArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The directory of the logs.")]
KeyOption = Annotated[Path, typer.Option("--master-key-file", help="The deployment's master key.")]
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
        key = chain_key(read_master_key(master_key_file))
        with closing(AuditDirectory(path)) as directory:
            result = verify(directory, key, known)
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
