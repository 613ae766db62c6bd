"""The least epoch that each zone may have: what a purge leaves behind. Pure."""

from __future__ import annotations

from engine.zone import Zone

MAX_EPOCH = 2**63 - 1
MAX_EPOCH_FLOORS = 65_536


class EpochFloors:
    """Floors only rise. Zones without one of their own have the base.

    Fails closed: where `MAX_EPOCH_FLOORS` zones have floors, the base rises to the highest of them. No floor is
    lower than before; zones that were never purged lose their cache until their epoch reaches the base.
    """

    def __init__(self) -> None:
        self._base = 0
        self._floors: dict[Zone, int] = {}

    def __bool__(self) -> bool:
        """False while every floor is 0."""
        return self._base > 0 or bool(self._floors)

    def of(self, zone: Zone) -> int:
        return self._floors.get(zone, self._base)

    def raise_to(self, zone: Zone, epoch: int) -> bool:
        """Raise the floor of `zone` to `epoch`, where it is lower.

        Returns:
            True where the table was full and the base rose: floors of other zones may have risen as well.
        """
        if epoch <= self.of(zone):
            return False
        self._floors[zone] = epoch
        if len(self._floors) <= MAX_EPOCH_FLOORS:
            return False
        self._base = max(self._floors.values())
        self._floors.clear()
        return True
