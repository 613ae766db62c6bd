"""`zoneserve audit` as an operator meets it."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
from contextlib import closing
from itertools import permutations
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deployments.trust.audit import AuditEvent, cli
from deployments.trust.audit.chain import Fault, Record, chain_key, holds_hash, seal
from deployments.trust.audit.files import AuditDirectory
from deployments.trust.audit.log import AuditLog
from deployments.trust.audit.verify import verify
from tests.deployments.trust.audit_support import (
    MASTER_KEY,
    OPTIONS,
    Clock,
    check,
    documents,
    files,
    hit,
    open_log,
    write_log,
)


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.out, "width", 250)


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    (tmp_path / "master.key").write_text(MASTER_KEY.hex() + "\n")
    return str(tmp_path / "master.key")


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    write_log(tmp_path / "log", num_events=12, clock=Clock(1_800_000_000_000))
    write_log(tmp_path / "log", num_events=12, stream="prefill-1", clock=Clock(1_800_000_000_005))
    return tmp_path / "log"


def audit(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.audit_app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_verify_of_an_intact_log_says_so_and_names_each_head(logs: Path, key_file: str) -> None:
    code, text, _ = audit("verify", logs, "--master-key-file", key_file)
    assert code == 0
    assert f"intact: {check(logs).num_records} records" in text
    for stream in check(logs).streams:
        assert f"{stream.stream}: " in text
        assert f"head {stream.head}" in text


def test_verify_of_an_edited_log_says_where_and_exits_1(logs: Path, key_file: str) -> None:
    file = files(logs)[1]
    file.write_bytes(file.read_bytes().replace(b'"num_blocks":7', b'"num_blocks":1'))
    code, text, _ = audit("verify", logs, "--master-key-file", key_file)
    assert code == 1
    (row,) = [line for line in text.splitlines() if file.name in line]
    assert "edited" in row
    assert "not intact: 1 edited" in text


def test_verify_takes_the_head_that_show_printed(logs: Path, key_file: str) -> None:
    _, text, _ = audit("show", logs, "--master-key-file", key_file)
    (line,) = [line for line in text.splitlines() if line.startswith("decode-1: ")]
    head = line.split("head ")[1].strip()
    assert audit("verify", logs, "--master-key-file", key_file, "--anchor", head)[0] == 0
    shutil.rmtree(logs)
    write_log(logs, num_events=12, clock=Clock(1))
    assert audit("verify", logs, "--master-key-file", key_file)[0] == 0
    code, text, _ = audit("verify", logs, "--master-key-file", key_file, "--anchor", head)
    assert code == 1
    assert "tail_cut" in text


def test_verify_with_another_key_exits_1(logs: Path, tmp_path: Path) -> None:
    (tmp_path / "other.key").write_text("ab" * 32)
    code, text, _ = audit("verify", logs, "--master-key-file", tmp_path / "other.key")
    assert code == 1
    assert "unsigned" in text


def test_a_log_is_read_under_the_key_of_the_ring_that_it_was_written_under(
    logs: Path, tmp_path: Path, key_file: str
) -> None:
    """Keys are rotated while logs stay: each stream has one key, its own."""
    newer = bytes(reversed(MASTER_KEY))
    with closing(AuditLog(logs, "decode-2", chain_key(newer), OPTIONS, Clock())) as log:
        log.add([(hit(1), 1_800_000_000_900)])
        log.commit()
    (tmp_path / "ring.key").write_text(f"{newer.hex()}\n{MASTER_KEY.hex()}\n")
    for command in ("verify", "show"):
        code, text, _ = audit(command, logs, "--master-key-file", tmp_path / "ring.key")
        assert (code, "intact: " in text, "decode-2: 2 records" in text) == (0, True, True), text
    code, text, _ = audit("verify", logs, "--master-key-file", key_file)
    assert code == 1  # decode-2 is of a key that this file does not hold
    rows = [line.split("│")[1:3] for line in text.splitlines() if "unsigned" in line and "│" in line]
    assert {log.strip() for _, log in rows} == {"decode-2"}


def test_records_of_two_keys_in_one_log_are_not_both_believed(tmp_path: Path) -> None:
    """Whoever has an old key cannot go on with a log of the new one."""
    newer = bytes(reversed(MASTER_KEY))
    write_log(tmp_path / "log", num_events=3)
    (file,) = files(tmp_path / "log")
    last = Record.parse(file.read_bytes().splitlines(keepends=True)[-1])
    forged = seal(hit(9), stream="decode-1", time_ms=last.time_ms, head=last.head, key=chain_key(newer))
    file.write_bytes(file.read_bytes() + forged.line())
    with closing(AuditDirectory(tmp_path / "log")) as directory:
        for keys in permutations([chain_key(MASTER_KEY), chain_key(newer)]):
            assert verify(directory, keys).counts == {Fault.UNSIGNED: 1}


@pytest.mark.parametrize("damage", ["no anchor", "a broken anchor"])
def test_a_log_without_a_good_anchor_is_read_under_the_key_of_its_first_record(damage: str, logs: Path) -> None:
    anchor = logs / "decode-1.anchor"
    anchor.unlink() if damage == "no anchor" else anchor.write_bytes(b"{}\n")
    with closing(AuditDirectory(logs)) as directory:
        result = verify(directory, [chain_key(b"n" * 32), chain_key(MASTER_KEY)])
    assert result.counts == {Fault.ANCHOR: 1}


@pytest.mark.parametrize("anchor", ["", "7", "7:ab", "x:" + "0" * 64])
def test_an_anchor_that_is_none_is_refused(anchor: str, logs: Path, key_file: str) -> None:
    code, _, error = audit("verify", logs, "--master-key-file", key_file, "--anchor", anchor)
    assert code == 2
    assert "SEQ:HASH" in error


def test_a_directory_without_a_log_is_an_error(tmp_path: Path, key_file: str) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing", "master.key"):
        code, _, error = audit("verify", tmp_path / name, "--master-key-file", key_file)
        assert code == 1
        assert error.startswith("error: ")
        assert len(error.splitlines()) == 1


def test_a_key_file_that_is_missing_is_an_error(logs: Path, tmp_path: Path) -> None:
    for command in ("verify", "show"):
        code, _, error = audit(command, logs, "--master-key-file", tmp_path / "none.key")
        assert code == 1
        assert error.startswith("error: ")


def test_show_has_the_last_records_by_time(logs: Path, key_file: str) -> None:
    code, text, _ = audit("show", logs, "--master-key-file", key_file, "--event", "cache.*", "--limit", "4")
    assert code == 0
    rows = [line for line in text.splitlines() if "cache.hit" in line]
    assert ["decode-1" in row for row in rows] == [True, False, True, False]
    assert ["num_blocks=10" in row for row in rows] == [True, True, False, False]
    assert "2027-01-15 08:00:00.120" in rows[2]


def test_show_chooses_by_kind_zone_and_time(tmp_path: Path, key_file: str) -> None:
    log = open_log(tmp_path / "log", rotate_bytes=1 << 20)
    log.add(
        [
            (hit(1, "tenant/acme/case/c1"), 1000),
            (hit(2, "tenant/bolt/case/c1"), 86_400_000),
            (hit(3, "public"), 86_400_000),
        ]
    )
    log.commit()
    log.close()

    def shown(*options: str) -> list[int]:
        code, text, _ = audit("show", tmp_path / "log", "--master-key-file", key_file, *options)
        assert code == 0
        return [number for number in (1, 2, 3) if f"num_blocks={number}" in text]

    assert shown() == [1, 2, 3]
    assert shown("--zone", "tenant/acme/*") == [1]
    assert shown("--zone", "public") == [3]
    assert shown("--since", "1970-01-02") == [2, 3]
    assert shown("--event", "cache.store") == []


def test_show_obeys_nothing_that_a_record_says(tmp_path: Path, key_file: str) -> None:
    write_log(tmp_path / "log", num_events=3)
    file = files(tmp_path / "log")[0]
    file.write_bytes(file.read_bytes().replace(b'"r-1"', b'"[red]\\u001b[2J"').replace(b'"r-2"', b'"[/x][red]"'))
    code, text, _ = audit("show", tmp_path / "log", "--master-key-file", key_file)
    assert code == 1
    assert "[/x][red]" in text
    assert "\x1b" not in text
    assert "malformed" in text


def test_export_has_the_verification_first_and_then_every_record_by_time(
    logs: Path, tmp_path: Path, key_file: str
) -> None:
    exported = tmp_path / "audit.jsonl"
    code, text, _ = audit("export", logs, "--master-key-file", key_file, "--out", exported)
    assert code == 0, text
    assert stat.S_IMODE(exported.stat().st_mode) == 0o600
    first, *lines = exported.read_bytes().splitlines(keepends=True)
    result = check(logs)
    assert json.loads(first)["verification"] == {
        "is_intact": True,
        "num_records": result.num_records,
        "counts": {},
        "findings": [],
        "logs": [
            {"log": s.stream, "num_records": s.num_records, "first_seq": 1, "head": str(s.head)} for s in result.streams
        ],
    }
    records = [Record.parse(line) for line in lines]
    assert all(map(holds_hash, records))
    assert [r.time_ms for r in records] == sorted(r.time_ms for r in records)
    for stream in ("decode-1", "prefill-1"):
        assert [r.hash for r in records if r.stream == stream] == [d["hash"] for d in documents(logs, stream)]


def test_export_of_a_damaged_log_says_so_on_its_first_line(logs: Path, tmp_path: Path, key_file: str) -> None:
    files(logs)[1].unlink()
    exported = tmp_path / "audit.jsonl"
    code, _, _ = audit("export", logs, "--master-key-file", key_file, "--out", exported)
    assert code == 1
    first, *lines = exported.read_bytes().splitlines(keepends=True)
    verification = json.loads(first)["verification"]
    assert (verification["is_intact"], verification["counts"]) == (False, {"gap": 1})
    assert [finding["fault"] for finding in verification["findings"]] == ["gap"]
    assert len(lines) == verification["num_records"]


def test_export_overwrites_nothing(logs: Path, tmp_path: Path, key_file: str) -> None:
    exported = tmp_path / "audit.jsonl"
    exported.write_text("mine")
    code, _, error = audit("export", logs, "--master-key-file", key_file, "--out", exported)
    assert code == 1
    assert error.startswith("error: ")
    assert exported.read_text() == "mine"


def test_an_export_of_more_logs_than_files_may_be_open(tmp_path: Path, key_file: str) -> None:
    for number in range(60):
        log = open_log(tmp_path / "log", f"replica-{number}")
        log.add([(AuditEvent("policy.load", policy_digest="ab" * 32), number)])
        log.commit()
        log.close()
    # A process of its own: this one may have more files open than the limit.
    main = [sys.executable, "-c", "from deployments.cli import main; main()"]
    options = ["--master-key-file", key_file, "--out", str(tmp_path / "all")]
    result = subprocess.run(
        ["bash", "-c", 'ulimit -n 48; exec "$@"', "-", *main, "audit", "export", str(tmp_path / "log"), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert len((tmp_path / "all").read_text().splitlines()) == 121
