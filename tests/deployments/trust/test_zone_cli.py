"""`zoneserve zone` as a user meets it: keys, publication and its veto, the listing."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from deployments.trust import zone_cli
from deployments.trust.manifest_keys import TrustedKeys
from deployments.trust.manifest_set import ManifestSet
from deployments.trust.phi.presidio import DetectorError
from engine.zone import PUBLIC, Zone

GOLD = "tenant/acme/plan/gold"


class Desk:
    """A folder with a key for `public` and the plans of acme."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.key, self.trusted, self.out = path / "key.pem", path / "trusted.yaml", path / "manifests"
        made = self.run(
            "keygen", str(self.key), "--zone", "public", "--zone", "tenant/acme/plan/*", "--trusted", str(self.trusted)
        )
        assert made.exit_code == 0, made.output

    def run(self, *arguments: str) -> Result:
        return CliRunner(env={"COLUMNS": "200"}).invoke(zone_cli.zone_app, list(arguments))

    def text(self, name: str, content: str | bytes) -> str:
        path = self.path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def publish(self, *files: str, **options: str) -> Result:
        chosen = {
            "zone": GOLD,
            "key": str(self.key),
            "approver": "Plan office",
            "expires": "2100-01-01",
            "out": str(self.out),
        }
        flags = [part for name, value in (chosen | options).items() for part in (f"--{name}", value)]
        return self.run("publish", *files, *flags)

    def manifests(self) -> Result:
        return self.run("manifests", str(self.out), "--trusted", str(self.trusted))

    def loaded(self) -> ManifestSet:
        loaded = ManifestSet(self.out, TrustedKeys.from_file(self.trusted), lambda: 4_000_000_000.0)
        loaded.reload()
        return loaded


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_key_is_its_owners_alone(desk: Desk) -> None:
    assert stat.S_IMODE(desk.key.stat().st_mode) == 0o600
    assert "PRIVATE" not in desk.trusted.read_text(encoding="utf-8")
    again = desk.run("keygen", str(desk.key), "--zone", "public", "--trusted", str(desk.trusted))
    assert again.exit_code == 1
    assert "File exists" in again.stderr


def test_key_for_a_zone_that_nobody_shares_is_not_made(desk: Desk) -> None:
    for zone in ("tenant/acme/case/c", "*", "tenant/*/plan/*", "tenant/" + "x" * 10_000 + "/plan/p"):
        refused = desk.run("keygen", str(desk.path / "other.pem"), "--zone", zone, "--trusted", str(desk.trusted))
        assert refused.exit_code == 1
        assert len(refused.stderr) < 400
    assert not (desk.path / "other.pem").exists()


def test_published_texts_are_shared_byte_for_byte(desk: Desk) -> None:
    content = "Rubric.\r\nPay what is due.\n"
    result = desk.publish(desk.text("Plan Rubric.md", content), desk.text("policies.md", "Policies."))
    assert result.exit_code == 0, result.output
    digest = hashlib.sha256(content.encode()).hexdigest()
    for said in (GOLD, "revision 1", "Plan office", "plan-rubric", digest, "policies", "ssn", "2100-01-01T00:00:00Z"):
        assert said in result.output
    assert desk.loaded().is_shareable(Zone.parse(GOLD), digest)
    assert not desk.loaded().is_shareable(PUBLIC, digest)


def test_each_publication_takes_the_place_of_the_one_before(desk: Desk) -> None:
    first, second = desk.text("a.md", "one"), desk.text("b.md", "two")
    assert desk.publish(first).exit_code == 0
    assert "revision 2" in desk.publish(second).output
    assert desk.publish(first, zone="public").exit_code == 0
    assert sorted(path.name for path in desk.out.glob("*.json")) == [
        "public.r1.json",
        "tenant..acme..plan..gold.r1.json",
        "tenant..acme..plan..gold.r2.json",
    ]
    listing = desk.manifests()
    assert listing.exit_code == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in listing.output.splitlines() if "│" in line]
    assert [(row[0], row[1], row[2], row[-1]) for row in rows] == [
        ("public", "1", "a", "in_force"),
        (GOLD, "1", "a", "superseded"),
        (GOLD, "2", "b", "in_force"),
    ]
    assert desk.loaded().digest in listing.output


def test_text_that_could_name_a_person_is_not_published_and_the_place_is_said(desk: Desk) -> None:
    fine = desk.text("fine.md", "Nothing.")
    bad = desk.text("bad.md", "Line one.\nMember ID: A1234567, call 555-555-0100\n")
    result = desk.publish(fine, bad)
    assert result.exit_code == 1
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.output.splitlines() if "│" in line]
    assert [row[1:] for row in rows] == [["2:12", "identifier"], ["2:27", "phone"]]
    assert all(row[0].endswith("bad.md") for row in rows)
    assert "A1234567" not in result.output
    assert "0100" not in result.output
    assert not desk.out.exists()


def test_name_of_a_file_that_could_name_a_person_is_not_published(desk: Desk) -> None:
    result = desk.publish(desk.text("mrn 1234567.md", "Nothing."))
    assert result.exit_code == 1
    assert "identifier (title)" in result.output


@pytest.mark.parametrize(
    ("content", "fault"),
    [(b"", "empty"), (b"\xff\xfe", "not UTF-8"), (b"x" * (1 << 20) + b"x", "larger than")],
)
def test_file_that_is_no_text_is_refused(desk: Desk, content: bytes, fault: str) -> None:
    result = desk.publish(desk.text("bad.md", content))
    assert result.exit_code == 1
    assert fault in result.stderr
    assert not desk.out.exists()


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"zone": "tenant/acme/case/c"}, "is not shared"),
        ({"zone": "ephemeral"}, "is not shared"),
        ({"zone": "tenant/acme/plan/.."}, "not a zone path"),
        ({"zone": "tenant/" + "x" * 10_000 + "/plan/p"}, "longer than 256"),
        ({"expires": "2020-01-01"}, "later than effective"),
        ({"expires": "tomorrow"}, "YYYY-MM-DD"),
        ({"expires": "2100-02-30"}, "day"),
        ({"effective": "2100-01-01"}, "later than effective"),
        ({"approver": ""}, "approver"),
        ({"approver": "a\x1b[2J"}, "approver"),
        ({"key": "nowhere.pem"}, "No such file"),
    ],
)
def test_publication_that_cannot_be_is_one_line_and_writes_nothing(
    desk: Desk, options: dict[str, str], fault: str
) -> None:
    result = desk.publish(desk.text("a.md", "one"), **options)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert fault in result.stderr
    assert len(result.stderr) < 500
    assert not desk.out.exists()


def test_missing_file_and_two_files_of_one_name_are_refused(desk: Desk) -> None:
    missing = desk.publish(str(desk.path / "none.md"))
    assert missing.exit_code == 1
    assert "none.md: No such file" in missing.stderr
    twice = desk.publish(desk.text("a.md", "one"), desk.text("A.txt", "two"))
    assert twice.exit_code == 1
    assert "2 files would both be called a" in twice.stderr


def test_detector_that_cannot_run_stops_the_publication(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise DetectorError("presidio does not start: OSError")

    monkeypatch.setattr(zone_cli, "load_presidio", broken)
    result = desk.publish(desk.text("a.md", "one"))
    assert result.exit_code == 1
    assert result.stderr == "error: presidio does not start: OSError\n"
    assert not desk.out.exists()


def test_listing_names_what_is_refused_and_why(desk: Desk) -> None:
    assert desk.publish(desk.text("a.md", "one")).exit_code == 0
    assert desk.publish(desk.text("a.md", "one"), zone="tenant/other/plan/gold").exit_code == 0
    assert desk.publish(desk.text("b.md", "two"), effective="2099-01-01").exit_code == 0
    (desk.out / "[red]bad[.json").write_text("{")
    listing = desk.manifests()
    assert listing.exit_code == 1
    assert "refused 'tenant..other..plan..gold.r1.json': foreign_zone" in listing.output
    assert "refused '[red]bad[.json': not_json" in listing.output
    assert "not_yet_effective" in listing.output
    assert "tenant/other" not in listing.output


def test_listing_without_trusted_keys_is_refused(desk: Desk) -> None:
    result = desk.run("manifests", str(desk.out), "--trusted", str(desk.path / "none.yaml"))
    assert result.exit_code == 1
    assert result.stderr == f"error: {desk.path / 'none.yaml'}: No such file or directory\n"


def test_shipped_texts_are_published_once(desk: Desk) -> None:
    flags = ("--plan", "synthetic-ppo", "--key", str(desk.key), "--trusted", str(desk.trusted))
    ours = ("publish-shipped", *flags, "--approver", "Release", "--out", str(desk.out), "--tenant")
    first = desk.run(*ours, "acme")
    assert first.exit_code == 0, first.output
    assert first.output.count(": signed") == 2
    assert "nothing to sign" in desk.run(*ours, "acme").output
    assert desk.run(*ours, "other").exit_code == 1
