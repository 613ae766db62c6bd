"""The manifests of a folder over time: what is in force, what is refused, and no way back to an older revision."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deployments.claims.model import canonical_sha256
from deployments.trust.manifest import ManifestError, Reason, SignedManifest, json_files, read_bounded, verify
from deployments.trust.manifest_keys import TrustedKeys
from engine.zone import PUBLIC, Zone


@dataclass(frozen=True, slots=True)
class Refusal:
    """A file that gave nothing, and why."""

    file: str
    reason: Reason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Floor:
    """The highest revision of a zone that was ever in force: below is a roll-back, other content at it a conflict."""

    revision: int
    sha256: str
    key_id: str


@dataclass(frozen=True, slots=True)
class _State:
    files: Mapping[str, SignedManifest] = field(default_factory=dict)
    floors: Mapping[Zone, Floor] = field(default_factory=dict)
    refusals: tuple[Refusal, ...] = ()


class ManifestSet:
    """The manifests of a folder. Empty until `reload`; queries take the clock's time, so expiry needs no reload.

    A reload keeps what was loaded where the folder or a file has a fault, or where it would roll a zone back. A zone
    shares no more once all its files are gone, its manifest in force lists less, or the signer is not trusted for it.

    Attributes:
        trusted: The keys that count, as of the last reload.
    """

    def __init__(
        self,
        folder: Path,
        trusted: TrustedKeys,
        clock: Callable[[], float],
        *,
        floors: Mapping[Zone, Floor] | None = None,
    ) -> None:
        """
        Args:
            clock: Unix time in seconds.
            floors: `floors` of an earlier process, so that a restart opens no way to roll back.
        """
        self._folder = folder
        self.trusted = trusted
        self._clock = clock
        self._state = _State(floors=dict(floors or {}))

    def reload(self, trusted: TrustedKeys | None = None) -> tuple[Refusal, ...]:
        """Read the folder again, with other trusted keys if given. Returns what was refused; raises nothing.

        The new state takes the old one's place in one assignment: a query sees one or the other.
        """
        self.trusted = trusted or self.trusted
        now = self._clock()
        before = self._still_trusted(now)
        try:
            paths = json_files(self._folder)
        except ManifestError as error:
            refusal = Refusal(self._folder.name, error.reason, error.detail)
            self._state = _State(before.files, before.floors, (refusal,))
            return self._state.refusals
        found: dict[str, SignedManifest] = {}
        refusals: list[Refusal] = []
        for path in paths:
            try:
                found[path.name] = verify(read_bounded(path), self.trusted)
            except ManifestError as error:
                refusals.append(Refusal(path.name, error.reason, error.detail))
                if path.name in before.files:
                    found[path.name] = before.files[path.name]
        files = _admit(found, before, now, refusals)
        floors = {**before.floors, **_floors(files, now)}
        self._state = _State(files, floors, tuple(sorted(refusals, key=lambda refusal: refusal.file)))
        return self._state.refusals

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Of the last reload."""
        return self._state.refusals

    @property
    def floors(self) -> Mapping[Zone, Floor]:
        """For a later process, as of the last reload."""
        return dict(self._state.floors)

    @property
    def files(self) -> Mapping[str, SignedManifest]:
        """Every manifest that is kept, by file name: in force, to come, expired, or under a later revision."""
        return dict(self._state.files)

    def in_force(self) -> dict[Zone, SignedManifest]:
        """The manifest that holds in each zone now."""
        now = self._clock()
        return {
            zone: top for zone, top in _effective(self._state.files.values(), now).items() if top.state(now) is None
        }

    def is_shareable(self, zone: Zone, content_digest: str) -> bool:
        """As `is_listed`, now."""
        return is_listed(self.in_force(), zone, content_digest)

    def zone_of(self, content_digest: str, tenant: str) -> Zone | None:
        """As `zone_that_lists`, now."""
        return zone_that_lists(self.in_force(), content_digest, tenant)

    @property
    def digest(self) -> str:
        """As `digest_of`, now."""
        return digest_of(self.in_force())

    def _still_trusted(self, now: float) -> _State:
        state = self._state
        floors = {**state.floors, **_floors(state.files, now)}
        return _State(
            {n: s for n, s in state.files.items() if self.trusted.may_sign_for(s.key_id, s.zone)},
            # A stolen key's revision must not bar its successor's once the key is withdrawn.
            {zone: floor for zone, floor in floors.items() if self.trusted.may_sign_for(floor.key_id, zone)},
        )


def is_listed(in_force: Mapping[Zone, SignedManifest], zone: Zone, content_digest: str) -> bool:
    """True if the manifest in force for the zone lists the text with this SHA-256 (hex)."""
    signed = in_force.get(zone)
    return signed is not None and content_digest in signed.content_digests


def zone_that_lists(
    in_force: Mapping[Zone, SignedManifest], content_digest: str, tenant: str, segment_id: str | None = None
) -> Zone | None:
    """The zone a tenant's principal shares this text in: public before a plan of the tenant, plans by name.

    Args:
        segment_id: The id that the text must stand under; None: any.

    Returns:
        None where no manifest in force lists the text for this tenant.
    """
    listing = {
        zone
        for zone, signed in in_force.items()
        if (zone == PUBLIC or zone.tenant == tenant)
        and content_digest in signed.content_digests
        and (
            segment_id is None
            or any(item.id == segment_id and item.sha256 == content_digest for item in signed.manifest.segments)
        )
    }
    return min(listing, key=lambda zone: (zone.kind, zone.name), default=None)


def digest_of(in_force: Mapping[Zone, SignedManifest]) -> str:
    """SHA-256 (hex) of which manifests are in force: equal digests, equal sharing."""
    return canonical_sha256(
        sorted([zone.path, signed.manifest.revision, signed.sha256] for zone, signed in in_force.items())
    )


def _effective(manifests: Iterable[SignedManifest], now: float) -> dict[Zone, SignedManifest]:
    """Of each zone the highest revision that has come into effect, expired or not."""
    top: dict[Zone, SignedManifest] = {}
    for signed in manifests:
        if signed.effective <= now and signed.manifest.revision > _revision(top.get(signed.zone)):
            top[signed.zone] = signed
    return top


def _revision(signed: SignedManifest | None) -> int:
    return signed.manifest.revision if signed else 0


def _floors(files: Mapping[str, SignedManifest], now: float) -> dict[Zone, Floor]:
    return {
        zone: Floor(signed.manifest.revision, signed.sha256, signed.key_id)
        for zone, signed in _effective(files.values(), now).items()
    }


def _admit(
    found: Mapping[str, SignedManifest], before: _State, now: float, refusals: list[Refusal]
) -> dict[str, SignedManifest]:
    """Of what was found, what may stand beside what was loaded; zone by zone, so that one zone costs no other."""
    by_zone: dict[Zone, dict[str, SignedManifest]] = defaultdict(dict)
    for name, signed in found.items():
        by_zone[signed.zone][name] = signed
    admitted: dict[str, SignedManifest] = {}
    for zone, candidates in by_zone.items():
        floor = before.floors.get(zone)
        loaded = {name: signed for name, signed in before.files.items() if signed.zone == zone}
        content = {signed.manifest.revision: signed.sha256 for signed in loaded.values()}
        if floor is not None:
            content[floor.revision] = floor.sha256
        contents: dict[int, set[str]] = defaultdict(set)
        for signed in candidates.values():
            contents[signed.manifest.revision].add(signed.sha256)
        kept = {}
        for name, signed in candidates.items():
            revision = signed.manifest.revision
            # Between two contents new to us nothing decides; one that was loaded before stands.
            if signed.sha256 == content.get(revision) or (revision not in content and len(contents[revision]) == 1):
                kept[name] = signed
            else:
                refusals.append(Refusal(name, Reason.CONFLICT, f"revision {revision}"))
        if floor is not None and _revision(_effective(kept.values(), now).get(zone)) < floor.revision:
            refusals.extend(
                Refusal(name, Reason.ROLLED_BACK, f"revision {signed.manifest.revision} under {floor.revision}")
                for name, signed in kept.items()
                if signed.manifest.revision < floor.revision
            )
            kept = {
                name: signed for name, signed in kept.items() if signed.manifest.revision >= floor.revision
            } | loaded
        admitted |= kept
    return admitted
