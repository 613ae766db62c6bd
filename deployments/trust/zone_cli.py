"""`zoneserve zone`: keys, the texts that may be shared, what is shared now, purges and their receipts."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from deployments.local import CLIENT_KEY_FILE
from deployments.trust.key_files import KeyFileError, create_file
from deployments.trust.keyring import MAX_KEYS_IN_RING, read_keyring, rotate_key
from deployments.trust.manifest import Manifest, ManifestError, next_revision, publish, rfc3339, unix_time
from deployments.trust.manifest_keys import (
    TrustedKeys,
    check_zone_pattern,
    create_signing_key,
    is_shareable_kind,
    key_id_of,
    read_signing_key,
    trust,
)
from deployments.trust.manifest_set import ManifestSet
from deployments.trust.phi import DETECTORS, Detector, positions
from deployments.trust.phi.presidio import DetectorError, load_presidio
from deployments.trust.purge_client import PurgeError, read_bearer_key, request_purge
from deployments.trust.receipts import (
    MAX_RECEIPT_BYTES,
    ReceiptError,
    SignedReceipt,
    read_receipt_keys,
    receipt_keys,
    verify_receipt,
)
from deployments.trust.shareable import (
    MAX_SEGMENT_BYTES,
    Publication,
    PublicationVetoed,
    publish_shipped,
)
from engine.zone import Zone

zone_app = typer.Typer(no_args_is_help=True, help="Trust zones: what may be shared, and who says so.")

# What files and manifests are called is text, not markup.
out = Console(markup=False, highlight=False)
err = Console(stderr=True, markup=False, highlight=False)

KeyOption = Annotated[Path, typer.Option("--key", help="The signing key (PEM), as `zone keygen` makes it.")]
OutOption = Annotated[Path, typer.Option("--out", help="Folder of manifests.")]
ApproverOption = Annotated[str, typer.Option(help="Who vouches for the texts.")]
TrustedOption = Annotated[Path, typer.Option("--trusted", help="YAML file of the public keys that count.")]
MasterKeyOption = Annotated[
    Path | None, typer.Option("--master-key-file", help="The deployment's master keys; else the environment's secret.")
]
ReceiptKeyOption = Annotated[
    Path | None, typer.Option("--receipt-key", help="File of public keys, as `zone receipt-key` prints them.")
]


@zone_app.command("keygen")
def keygen(
    key_file: Annotated[Path, typer.Argument(help="Where the private key goes; must not exist.")],
    zones: Annotated[list[str], typer.Option("--zone", help="What it may sign for: public, tenant/T/plan/P or /*.")],
    trusted: TrustedOption,
) -> None:
    """Make an Ed25519 key that its owner alone can read, and add its public half to the trusted ones."""
    with _one_line_errors():
        for zone in zones:
            check_zone_pattern(zone)
        key = create_signing_key(key_file)
        trust(trusted, key.public_key(), zones)
        _say(f"key {key_id_of(key.public_key())} in {key_file}; trusted in {trusted} for {', '.join(zones)}")


@zone_app.command("publish")
def publish_texts(
    files: Annotated[list[Path], typer.Argument(help="Texts, one a file, byte for byte as prompts carry them.")],
    *,
    zone: Annotated[str, typer.Option(help="public or tenant/T/plan/P.")],
    key: KeyOption,
    approver: ApproverOption,
    expires: Annotated[str, typer.Option(help="YYYY-MM-DD or YYYY-MM-DDTHH:MM:SSZ, UTC.")],
    out_dir: OutOption,
    effective: Annotated[str | None, typer.Option(help="As --expires; now if left out.")] = None,
) -> None:
    """Sign a manifest that lists these texts for a zone, and no others: it takes the place of the one before.

    A text in which a detector finds what could name a person is not published: exit status 1 and where it is.
    """
    with _one_line_errors():
        into = Zone.parse(zone)
        if not is_shareable_kind(into):
            raise ValueError(f"{zone} is not shared; public or a plan is")
        texts = _read_texts(files)
        detectors = _detectors()
        _refuse_findings(files, texts, detectors)
        manifest = Manifest(
            zone=into.path,
            revision=next_revision(out_dir, into),
            approver=approver,
            effective=rfc3339(time.time()) if effective is None else _time(effective),
            expires=_time(expires),
            segments=tuple(text.entry() for text in texts),
        )
        path = publish(out_dir, manifest, read_signing_key(key), texts=[text.text for text in texts])
        table = Table("segment", "sha256", title=f"{zone}, revision {manifest.revision}, signed for {approver}")
        for segment in manifest.segments:
            table.add_row(segment.id, segment.sha256)
        out.print(table)
        _say(f"{path}: effective {manifest.effective}, expires {manifest.expires}")
        _say(f"looked at by: {', '.join(detector.name for detector in detectors)}")


@zone_app.command("publish-shipped")
def publish_shipped_texts(
    *,
    tenant: Annotated[str, typer.Option(help="Whose plan zones.")],
    plans: Annotated[list[str], typer.Option("--plan", help="A shipped plan.")],
    key: KeyOption,
    trusted: TrustedOption,
    approver: ApproverOption,
    out_dir: OutOption,
) -> None:
    """Sign the texts that this package's own prompts share, where their manifests are missing or stale."""
    with _one_line_errors():
        written = publish_shipped(
            out_dir,
            read_signing_key(key),
            TrustedKeys.from_file(trusted),
            tenant=tenant,
            plans=plans,
            approver=approver,
            now=time.time(),
        )
        for path in written:
            _say(f"{path}: signed")
        if not written:
            _say(f"{out_dir}: nothing to sign")


@zone_app.command("manifests")
def manifests(
    folder: Annotated[Path, typer.Argument(help="Folder of manifests.")],
    trusted: TrustedOption,
) -> None:
    """List what is shared now, what is not and why. Exit status 1 if a manifest is refused."""
    with _one_line_errors():
        now = time.time()
        loaded = ManifestSet(folder, TrustedKeys.from_file(trusted), lambda: now)
        refusals = loaded.reload()
        in_force = loaded.in_force()
        table = Table(title=str(folder))
        for name in ("zone", "revision", "segments", "approver", "effective", "expires", "state"):
            table.add_column(name, overflow="fold")  # whole in a narrow terminal too
        for signed in sorted(loaded.files.values(), key=lambda signed: (signed.zone.path, signed.manifest.revision)):
            manifest = signed.manifest
            state = signed.state(now) or ("in_force" if in_force.get(signed.zone) is signed else "superseded")
            table.add_row(
                manifest.zone,
                str(manifest.revision),
                ", ".join(segment.id for segment in manifest.segments),
                manifest.approver,
                manifest.effective,
                manifest.expires,
                state,
            )
        out.print(table)
        _say(f"set digest {loaded.digest}")
        for refusal in refusals:
            _say(f"refused {refusal.file!r}: {refusal.reason}{f' ({refusal.detail})' if refusal.detail else ''}")
    raise typer.Exit(1 if refusals else 0)


@zone_app.command("purge")
def purge(
    zone: Annotated[str, typer.Argument(help="public, tenant/T/plan/P or tenant/T/case/C.")],
    *,
    url: Annotated[str, typer.Option(help="The deployment.")],
    key_file: Annotated[Path, typer.Option(help="File with the bearer key of one who may purge.")] = CLIENT_KEY_FILE,
    receipt_key: ReceiptKeyOption = None,
    out_file: Annotated[Path | None, typer.Option("--out", help="Where the receipt goes; must not exist.")] = None,
) -> None:
    """Drop a zone from every cache. Exit status 0 only if every replica has done so and the receipt, if there is a key
    to check it with, holds. Asking again is harmless."""
    with _one_line_errors():
        if out_file is not None and out_file.exists():
            raise ValueError(f"{out_file}: exists; nothing was purged")
        keys = () if receipt_key is None else read_receipt_keys(receipt_key)
        signed = request_purge(url, read_bearer_key(key_file), zone, keys)
        _show_receipt(signed)
        if out_file is not None:
            out_file.parent.mkdir(parents=True, exist_ok=True)
            create_file(out_file, signed.data, mode=0o644)
        if not keys:
            _say("not verified: --receipt-key names no key")
    raise typer.Exit(0 if signed.receipt.complete else 1)


@zone_app.command("receipt-key")
def receipt_key(master_key_file: MasterKeyOption = None) -> None:
    """Print the public keys that receipts are checked with: one for each master key, newest first."""
    with _one_line_errors():
        for key in receipt_keys(read_keyring(master_key_file)):
            _say(f"{key.public_bytes_raw().hex()}  # receipts signed by {key_id_of(key)}")


@zone_app.command("check-receipt")
def check_receipt(
    file: Annotated[Path, typer.Argument(help="A receipt, as `zone purge --out` writes it.")],
    *,
    receipt_key: ReceiptKeyOption = None,
    master_key_file: MasterKeyOption = None,
) -> None:
    """Check a receipt's signature, by the public keys or the master keys. Exit status 0 only if it holds and says that
    the purge was complete."""
    with _one_line_errors():
        keys = receipt_keys(read_keyring(master_key_file)) if receipt_key is None else read_receipt_keys(receipt_key)
        with file.open("rb") as opened:
            signed = verify_receipt(opened.read(MAX_RECEIPT_BYTES + 1), keys)
        _show_receipt(signed)
    raise typer.Exit(0 if signed.receipt.complete else 1)


@zone_app.command("rotate-key")
def rotate_master_key(
    master_key_file: Annotated[Path, typer.Argument(help="The deployment's master keys; replaced whole.")],
    *,
    keep: Annotated[
        int | None, typer.Option(min=1, max=MAX_KEYS_IN_RING - 1, help="Old keys that stay at most; all if left out.")
    ] = None,
) -> None:
    """Put a new master key before the old ones. An audit log can be verified as long as its key is among them."""
    with _one_line_errors():
        done = rotate_key(master_key_file, num_kept=keep, now=time.time())
        table = Table("master key", "state", title=str(master_key_file))
        table.add_row(done.new, "new")
        for state, names in (("kept", done.kept), ("dropped", done.dropped)):
            for name in names:
                table.add_row(name, state)
        out.print(table)


def _show_receipt(signed: SignedReceipt) -> None:
    receipt = signed.receipt
    table = Table(title=f"{receipt.zone}, epoch {receipt.epoch}")
    for name in ("pool", "replica", "outcome", "findable", "scrubbed", "in use", "pinned"):
        table.add_column(name, overflow="fold")
    for pool in receipt.pools:
        for replica in pool.replicas:
            counts = (replica.num_findable, replica.num_scrubbed, replica.num_in_use, replica.num_pinned)
            table.add_row(pool.pool, replica.replica, replica.outcome.value, *map(str, counts))
    out.print(table)
    _say(f"{rfc3339(receipt.finished_ms / 1000)}: by {receipt.principal}, signed by {signed.key_id}")
    _say("complete" if receipt.complete else "INCOMPLETE: not every replica has purged; ask again")


def _read_texts(files: list[Path]) -> list[Publication]:
    texts = [_read_text(path) for path in files]
    name, count = Counter(text.id for text in texts).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{count} files would both be called {name} in the manifest")
    return texts


def _read_text(path: Path) -> Publication:
    with path.open("rb") as file:
        data = file.read(MAX_SEGMENT_BYTES + 1)
    if len(data) > MAX_SEGMENT_BYTES:
        raise ValueError(f"{path}: larger than {MAX_SEGMENT_BYTES} bytes")
    if not data:
        raise ValueError(f"{path}: empty")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8") from None
    identifier = re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-")[:64].strip("-") or "segment"
    return Publication(identifier, text, identifier)


def _detectors() -> tuple[Detector, ...]:
    presidio = load_presidio()
    return DETECTORS if presidio is None else (*DETECTORS, presidio)


def _refuse_findings(files: list[Path], texts: list[Publication], detectors: tuple[Detector, ...]) -> None:
    table = Table("file", "line:column", "detector", title="not published: could name a person")
    for path, text in zip(files, texts, strict=True):
        findings = text.findings(detectors)
        for finding, (line, column) in zip(findings, positions(text.text, findings), strict=True):
            table.add_row(str(path), f"{line}:{column}", finding.detector)
    if table.row_count:
        out.print(table)
        raise typer.Exit(1)


def _time(text: str) -> str:
    whole = f"{text}T00:00:00Z" if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text) else text
    unix_time(whole)
    return whole


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        _fail(f"{'.'.join(map(str, fault['loc'])) or 'manifest'}: {fault['msg']}")
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}")
    except (
        ManifestError, KeyFileError, DetectorError, PublicationVetoed, PurgeError, ReceiptError, ValueError
    ) as error:  # fmt: skip
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    err.print(f"error: {message}", soft_wrap=True)
    raise typer.Exit(1) from None


def _say(text: str) -> None:
    out.print(text, soft_wrap=True)
