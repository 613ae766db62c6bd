"""A log on disk: committed, rotated, anchored, resumed after any end; and every way of tampering with it."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.trust.audit.chain import GENESIS, Fault, Head, chain_key
from deployments.trust.audit.files import AuditDirectory, AuditError
from deployments.trust.audit.log import AuditLog, AuditOptions
from deployments.trust.audit.verify import MAX_FINDINGS
from tests.deployments.trust.audit_support import (
    KEY,
    Clock,
    check,
    documents,
    files,
    hit,
    open_log,
    request_ids,
    write_log,
)

STREAM = "decode-1"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole log of several files; tests copy it."""
    path = tmp_path_factory.mktemp("audit") / "log"
    write_log(path)
    return path


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def found(path: Path, key: bytes = KEY, anchors: tuple[Head, ...] = ()) -> list[tuple[Fault, str, int, int]]:
    return [(f.fault, f.file, f.line, f.seq) for f in check(path, key, anchors).findings]


# -- writing


def test_a_log_is_intact_over_several_files_and_holds_what_was_added(written: Path) -> None:
    result = check(written)
    assert result.is_intact
    (stream,) = result.streams
    assert (stream.stream, stream.num_files, stream.first_seq) == (STREAM, len(files(written)), 1)
    assert stream.num_files > 3
    assert stream.num_records == stream.head.seq == len(documents(written))
    assert request_ids(written) == [f"r-{number}" for number in range(30)]


def test_records_carry_what_they_must_and_nothing_else(written: Path) -> None:
    for seq, document in enumerate(documents(written), start=1):
        assert set(document) == {"event", "fields", "hash", "mac", "prev", "seq", "stream", "time_ms"}
        assert (document["seq"], document["stream"]) == (seq, STREAM)


def test_the_first_record_of_a_file_names_the_head_of_the_file_before(written: Path) -> None:
    records = {record["seq"]: record for record in documents(written)}
    assert records[1]["event"] == "audit.open"
    for file in files(written)[1:]:
        seq = int(file.name.split(".")[1])
        first, last = records[seq], records[seq - 1]
        assert (first["event"], first["prev"]) == ("audit.rotate", last["hash"])
        assert first["fields"] == {"count": seq - 1, "head": last["hash"], "reason": "size"}


def test_anchors_come_by_number_and_by_time_and_name_the_head(tmp_path: Path) -> None:
    clock = Clock()
    log = open_log(tmp_path / "log", clock=clock, anchor_records=4, anchor_s=60, rotate_bytes=1 << 20)
    log.add([(hit(0), clock.now_ms)])
    log.add(())
    assert log.counts.anchors == 0
    clock.now_ms += 60_000
    log.add(())
    log.add(())  # nothing but the anchor itself since
    assert log.counts.anchors == 1
    for number in range(1, 9):
        log.add([(hit(number), clock.now_ms)])
    log.commit()
    log.close()
    assert [d["event"] for d in documents(tmp_path / "log")] == (
        ["audit.open", "cache.hit", "audit.anchor"] + (["cache.hit"] * 4 + ["audit.anchor"]) * 2
    )
    records = documents(tmp_path / "log")
    for before, anchor in pairwise(records):
        if anchor["event"] == "audit.anchor":
            assert anchor["fields"] == {"count": before["seq"], "head": before["hash"]}
    with closing(AuditDirectory(tmp_path / "log")) as directory:
        assert directory.read_anchor(STREAM, KEY) == log.committed


def test_a_file_is_closed_when_it_is_old(tmp_path: Path) -> None:
    clock = Clock()
    log = open_log(tmp_path / "log", clock=clock, rotate_bytes=1 << 20, rotate_s=3600)
    log.add([(hit(0), clock.now_ms)])
    log.commit()
    clock.now_ms += 3_600_000
    log.commit()
    clock.now_ms += 3_600_000
    log.commit()  # a file that holds nothing but its first record stays
    log.close()
    assert log.counts.rotations == 1
    assert [d["event"] for d in documents(tmp_path / "log")] == ["audit.open", "cache.hit", "audit.rotate"]
    assert documents(tmp_path / "log")[-1]["fields"]["reason"] == "age"  # type: ignore[index]
    assert check(tmp_path / "log").is_intact


def test_files_are_their_owners_alone(written: Path) -> None:
    assert stat.S_IMODE(written.stat().st_mode) == 0o700
    for file in written.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_directory_that_others_may_enter_is_refused(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.mkdir()
    path.chmod(mode)
    with pytest.raises(AuditError, match="0700"):
        open_log(path)
    assert not list(path.iterdir())


def test_a_directory_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "log").symlink_to(tmp_path / "real")
    with pytest.raises(AuditError):
        open_log(tmp_path / "log")
    assert not list((tmp_path / "real").iterdir())


@pytest.mark.parametrize("name", ["lock", "0000000000000001.jsonl", "anchor", "anchor.new"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_file_that_is_a_link_or_a_pipe_is_not_opened(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.mkdir(mode=0o700)
    target = tmp_path / "target"
    target.write_text("left alone")
    if kind == "link":
        (path / f"{STREAM}.{name}").symlink_to(target)
    else:
        os.mkfifo(path / f"{STREAM}.{name}")
    with pytest.raises(AuditError):
        open_log(path)
    assert target.read_text() == "left alone"


def test_a_log_has_one_writer(tmp_path: Path) -> None:
    log = open_log(tmp_path / "log")
    with pytest.raises(AuditError, match="another process"):
        open_log(tmp_path / "log")
    other = open_log(tmp_path / "log", "decode-2")
    other.close()
    log.close()
    open_log(tmp_path / "log").close()
    assert {stream.stream for stream in check(tmp_path / "log").streams} == {"decode-1", "decode-2"}


@pytest.mark.parametrize("stream", ["", "a/b", "..", "a.b", "a" * 65, "-a", "é"])
def test_a_log_has_a_plain_name(stream: str, tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="name"):
        open_log(tmp_path / "log", stream)


# -- every end and every start again


@st.composite
def schedules(draw: st.DrawFn) -> list[tuple[str, int]]:
    steps = ["add", "commit", "wait", "restart", "crash", "torn", "full"]
    return draw(st.lists(st.tuples(st.sampled_from(steps), st.integers(1, 40)), max_size=30))


@given(schedules())
def test_verify_accepts_whatever_is_written_over_any_schedule(
    tmp_path_factory: pytest.TempPathFactory, schedule: list[tuple[str, int]]
) -> None:
    path = tmp_path_factory.mktemp("walk") / "log"
    clock = Clock()
    log = open_log(path, clock=clock, rotate_bytes=4000, anchor_records=7, rotate_s=300)
    added = committed = num_torn = 0
    for step, size in schedule:
        if step == "add":
            log.add((hit(added + number), clock.now_ms) for number in range(size))
            added += size
        elif step == "commit":
            log.commit()
            committed = added
        elif step == "wait":
            clock.now_ms += size * 10_000
        elif step == "full":
            log.add([(hit(added), clock.now_ms)])
            added += 1
            with on_a_full_disk(log), pytest.raises(OSError):
                log.commit()
        else:
            if step == "restart":
                log.commit()
                committed = added
            log.close()
            added = committed
            if step == "torn":
                with files(path)[-1].open("ab") as file:
                    file.write(b'{"event":"cache.hit","fields":'[:size])
                num_torn += 1
                assert [f[0] for f in found(path)] == [Fault.TORN]
            log = open_log(path, clock=clock, rotate_bytes=4000, anchor_records=7, rotate_s=300)
        assert check(path).is_intact
        assert request_ids(path) == [f"r-{number}" for number in range(committed)]
    log.close()
    torn = [d for d in documents(path) if d["event"] == "audit.open" and d["fields"]["reason"] == "torn"]  # type: ignore[index]
    assert len(torn) == num_torn


class on_a_full_disk:
    """Every write to the log's newest file meets a real ENOSPC."""

    def __init__(self, log: object) -> None:
        self._fd: int = log._fd  # type: ignore[attr-defined]

    def __enter__(self) -> None:
        self._saved = os.dup(self._fd)
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, self._fd)
        os.close(full)

    def __exit__(self, *_: object) -> None:
        os.dup2(self._saved, self._fd)
        os.close(self._saved)


def test_after_a_full_disk_nothing_is_lost_or_written_twice(tmp_path: Path) -> None:
    log = open_log(tmp_path / "log", rotate_bytes=1 << 20)
    log.add([(hit(0), 1)])
    with on_a_full_disk(log), pytest.raises(OSError) as failure:
        log.commit()
    assert failure.value.errno == errno.ENOSPC
    assert log.num_uncommitted == 1
    log.add([(hit(1), 2)])
    log.commit()
    log.close()
    assert request_ids(tmp_path / "log") == ["r-0", "r-1"]
    assert check(tmp_path / "log").is_intact


def test_after_a_failed_fsync_the_same_bytes_are_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_log(tmp_path / "log", rotate_bytes=1 << 20)
    log.add([(hit(0), 1)])
    real, num_calls = os.fsync, 0

    def failing(opened: int) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            raise OSError(errno.EIO, "Input/output error")
        real(opened)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output"):
        log.commit()
    assert log.num_uncommitted == 1
    assert request_ids(tmp_path / "log") == ["r-0"]  # in the file, but perhaps not on the medium
    log.commit()
    log.close()
    assert request_ids(tmp_path / "log") == ["r-0"]
    assert check(tmp_path / "log").is_intact


def test_a_torn_line_is_kept_reported_and_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = open_log(path, rotate_bytes=1 << 20)
    log.add([(hit(0), 1), (hit(1), 2)])
    log.commit()
    log.close()
    (file,) = files(path)
    whole = file.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for length in range(1, len(whole) - start):
        file.write_bytes(whole[: start + length])
        assert found(path) == [(Fault.TORN, file.name, 3, 3)]
        open_log(path, rotate_bytes=1 << 20).close()
        assert check(path).is_intact
        last = documents(path)[-1]
        assert (last["event"], last["seq"]) == ("audit.open", 3)
        digest = last["fields"]["torn_digest"]  # type: ignore[index]
        assert last["fields"] == {"reason": "torn", "torn_bytes": length, "torn_digest": digest}
        (kept,) = path.glob("*.torn")
        assert kept.read_bytes() == whole[start : start + length]
        kept.unlink()


def test_a_file_without_one_whole_record_is_gone_on_with(tmp_path: Path) -> None:
    for number, left in enumerate([b"", b'{"event"']):
        path = tmp_path / f"log{number}"
        write_log(path)
        head = check(path).streams[0].head
        (path / f"{STREAM}.{head.seq + 1:016d}.jsonl").write_bytes(left)
        (path / f"{STREAM}.{head.seq + 1:016d}.jsonl").chmod(0o600)
        open_log(path).close()
        assert check(path).is_intact
        assert check(path).streams[0].head.seq == head.seq + 1


def test_a_log_begun_but_never_written_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.mkdir(mode=0o700)
    with closing(AuditDirectory(path, create=True)) as directory:
        directory.write_anchor(STREAM, GENESIS, KEY)
        assert check(path).is_intact
        os.close(directory.open(f"{STREAM}.{1:016d}.jsonl", os.O_CREAT | os.O_WRONLY))
    assert check(path).is_intact
    open_log(path).close()
    assert check(path).streams[0].head.seq == 1
    assert check(path).is_intact


def remove_the_anchor(path: Path) -> None:
    (path / f"{STREAM}.anchor").unlink()


def edit_the_anchor(path: Path) -> None:
    file = path / f"{STREAM}.anchor"
    file.write_text(file.read_text().replace('"seq":', '"seq":1'))


def remove_the_logs(path: Path) -> None:
    for file in files(path):
        file.unlink()


def remove_the_last_log(path: Path) -> None:
    files(path)[-1].unlink()


def cut_the_last_line(path: Path) -> None:
    file = files(path)[-1]
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))


def cut_into_the_last_line(path: Path) -> None:
    file = files(path)[-1]
    file.write_bytes(file.read_bytes()[:-10])


def misname_an_empty_last_file(path: Path) -> None:
    (path / f"{STREAM}.{9999:016d}.jsonl").write_bytes(b"")


def edit_the_last_line(path: Path) -> None:
    file = files(path)[-1]
    file.write_bytes(file.read_bytes()[:-20] + b"0000000000" + file.read_bytes()[-10:])


def forge_the_last_line(path: Path) -> None:
    shutil.rmtree(path)
    write_log(path)
    for file in files(path):
        file.write_bytes(file.read_bytes().replace(b"decode-1", b"decode-2"))


@pytest.mark.parametrize(
    "damage",
    [remove_the_anchor, edit_the_anchor, remove_the_logs, remove_the_last_log, cut_the_last_line,
     cut_into_the_last_line, misname_an_empty_last_file, edit_the_last_line, forge_the_last_line],
)  # fmt: skip
def test_a_damaged_log_is_found_and_nothing_is_added_to_it(damage: Callable[[Path], None], copy: Path) -> None:
    damage(copy)
    assert not check(copy).is_intact
    before = {file.name: file.read_bytes() for file in copy.iterdir()}
    with pytest.raises(AuditError, match="damaged"):
        open_log(copy)
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == before


def test_a_log_that_ends_in_a_record_of_another_is_not_gone_on_with(copy: Path, tmp_path: Path) -> None:
    write_log(tmp_path / "other", stream="decode-2")
    line = files(tmp_path / "other", "decode-2")[-1].read_bytes().splitlines(keepends=True)[-1]
    with files(copy)[-1].open("ab") as file:
        file.write(line)
    with pytest.raises(AuditError, match="of another log"):
        open_log(copy)


def test_a_log_of_another_key_is_not_gone_on_with(copy: Path) -> None:
    with pytest.raises(AuditError, match="damaged"):
        AuditLog(copy, STREAM, chain_key(b"x" * 32), AuditOptions(), Clock())


# -- tampering


@given(st.data())
def test_every_changed_byte_of_every_file_is_found(
    written: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = Path(shutil.copytree(written, tmp_path_factory.mktemp("changed") / "log"))
    file = data.draw(st.sampled_from([*files(path), path / f"{STREAM}.anchor"]))
    content = bytearray(file.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    assert not check(path).is_intact
    shutil.rmtree(path)


@given(st.data())
def test_every_cut_is_found(written: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = Path(shutil.copytree(written, tmp_path_factory.mktemp("cut") / "log"))
    logs = files(path)
    whole = b"".join(file.read_bytes() for file in logs)
    start, end = sorted(data.draw(st.tuples(st.integers(0, len(whole)), st.integers(0, len(whole)))))
    if start == end:
        return
    position = 0
    for file in logs:
        content = file.read_bytes()
        keep = content[: max(0, start - position)] + content[max(0, end - position) :]
        file.write_bytes(keep)
        position += len(content)
    assert not check(path).is_intact
    shutil.rmtree(path)


def test_a_missing_file_is_found_at_the_head_in_the_middle_and_at_the_tail(written: Path, tmp_path: Path) -> None:
    names = [file.name for file in files(written)]
    firsts = [int(name.split(".")[1]) for name in names]
    last = check(written).streams[0].head.seq
    expected = [
        (names[0], [(Fault.HEAD_CUT, names[1], 1, firsts[1])]),
        (names[2], [(Fault.GAP, names[3], 1, firsts[3])]),
        (names[-1], [(Fault.TAIL_CUT, names[-2], 0, last)]),
    ]
    for name, findings in expected:
        path = Path(shutil.copytree(written, tmp_path / name))
        (path / name).unlink()
        assert found(path) == findings


def test_the_tail_that_was_cut_after_the_last_anchor_is_found_by_the_operators_own(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = open_log(path, rotate_bytes=1 << 20, anchor_records=100)
    log.add([(hit(number), 1) for number in range(5)])
    log.commit()
    log.close()
    head = check(path).streams[0].head
    cut_the_last_line(path)
    assert found(path) == []  # no anchor has named it: as if the process had been killed before it
    assert found(path, anchors=(head,)) == [(Fault.TAIL_CUT, "", 0, head.seq)]


def test_an_operators_anchor_finds_a_log_that_was_replaced_whole(written: Path, copy: Path) -> None:
    head = check(written).streams[0].head
    assert found(copy, anchors=(head, GENESIS)) == []
    shutil.rmtree(copy)
    write_log(copy, clock=Clock(1))
    assert found(copy) == []
    assert found(copy, anchors=(head,)) == [(Fault.TAIL_CUT, "", 0, head.seq)]


def test_a_log_whose_old_files_were_moved_away_is_intact_from_the_operators_anchor_on(copy: Path) -> None:
    logs = files(copy)
    seq = int(logs[2].name.split(".")[1]) - 1
    anchor = Head(seq, str(documents(copy)[seq - 1]["hash"]))
    logs[0].unlink()
    logs[1].unlink()
    assert found(copy) == [(Fault.HEAD_CUT, logs[2].name, 1, seq + 1)]
    assert found(copy, anchors=(anchor,)) == []
    assert found(copy, anchors=(Head(seq, "ab" * 32),))[0][0] is Fault.HEAD_CUT


def test_two_logs_of_one_name_do_not_fit_together(written: Path, copy: Path, tmp_path: Path) -> None:
    write_log(tmp_path / "other", clock=Clock(1_700_000_000_000))
    ours, others = files(copy), files(tmp_path / "other")
    assert [file.name for file in ours] == [file.name for file in others]
    shutil.copy(others[2], ours[2])
    assert {fault for fault, *_ in found(copy)} == {Fault.SPLICED}
    assert found(copy)[0][1:3] == (ours[2].name, 1)


def test_a_file_of_another_log_under_this_logs_name_is_foreign(copy: Path, tmp_path: Path) -> None:
    write_log(tmp_path / "other", stream="decode-2")
    shutil.copy(files(tmp_path / "other", "decode-2")[1], files(copy)[1])
    assert Fault.FOREIGN in {fault for fault, *_ in found(copy)}


def test_the_anchor_of_another_log_is_refused(copy: Path, tmp_path: Path) -> None:
    write_log(tmp_path / "other", stream="decode-2")
    shutil.copy(tmp_path / "other" / "decode-2.anchor", copy / f"{STREAM}.anchor")
    assert found(copy) == [(Fault.ANCHOR, f"{STREAM}.anchor", 0, 0)]


def test_a_log_that_contradicts_its_anchor_is_found(copy: Path, tmp_path: Path) -> None:
    write_log(tmp_path / "other", num_events=20, clock=Clock(5))
    shutil.copy(tmp_path / "other" / f"{STREAM}.anchor", copy / f"{STREAM}.anchor")
    ((fault, *_),) = found(copy)
    assert fault is Fault.ANCHOR


def test_a_renamed_file_is_found(copy: Path) -> None:
    last = files(copy)[-1]
    last.rename(copy / f"{STREAM}.{9999:016d}.jsonl")
    assert found(copy) == [(Fault.MISPLACED, f"{STREAM}.{9999:016d}.jsonl", 0, 9999)]


def test_a_file_that_is_a_link_is_not_read(copy: Path, tmp_path: Path) -> None:
    first = files(copy)[0]
    first.rename(tmp_path / "elsewhere")
    first.symlink_to(tmp_path / "elsewhere")
    assert found(copy)[0][:2] == (Fault.UNREADABLE, first.name)


def test_a_wrong_key_is_told_in_bounded_space(copy: Path) -> None:
    result = check(copy, key=chain_key(b"x" * 32))
    assert set(result.counts) == {Fault.UNSIGNED, Fault.ANCHOR}
    assert result.counts[Fault.UNSIGNED] == len(documents(copy))


def test_findings_are_counted_beyond_those_kept(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = open_log(path, rotate_bytes=1 << 20, anchor_records=1000)
    log.add([(hit(number), 1) for number in range(MAX_FINDINGS + 50)])
    log.commit()
    log.close()
    (file,) = files(path)
    file.write_bytes(file.read_bytes().replace(b'"num_blocks"', b'"num_tokens"'))
    result = check(path)
    assert result.counts == {Fault.EDITED: MAX_FINDINGS + 50}
    assert len(result.findings) == MAX_FINDINGS


PEAK_OF_A_CHECK = """
import sys, tracemalloc
from pathlib import Path
from tests.deployments.trust.audit_support import check
tracemalloc.start()
assert check(Path(sys.argv[1])).is_intact
print(tracemalloc.get_traced_memory()[1])
"""


def test_verification_takes_the_same_memory_for_a_longer_log(tmp_path: Path) -> None:
    peaks = []
    for num_events in (1500, 6000):
        path = tmp_path / str(num_events)
        log = open_log(path, rotate_bytes=1 << 20, anchor_records=1000)
        for start in range(0, num_events, 500):
            log.add([(hit(start + number), 1) for number in range(500)])
            log.commit()
        log.close()
        measured = subprocess.run(  # a process of its own: other threads of this one allocate too
            [sys.executable, "-c", PEAK_OF_A_CHECK, str(path)], capture_output=True, text=True, check=True
        )
        peaks.append(int(measured.stdout))
    assert peaks[1] < peaks[0] * 1.2
