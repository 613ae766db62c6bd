"""The audit log: what happened to whose zone, in a chain that shows every edit, drop, reorder and truncation.

record.py     which events there are, which fields each may carry, and the one way to write a record
chain.py      each record sealed to the one before it, and the check of that; pure
files.py      the directory: names, modes, no symbolic links, locks
log.py        one process's chain on disk: commit, rotate, anchor, resume after a crash
writer.py     the thread that commits in batches, and what callers meet when it cannot
verify.py     a directory checked and read as a stream
cli.py        `zoneserve audit verify | show | export`

What it does not show: records that were never written, and a truncation back to an older anchor by someone who can
also put the older anchor file back. Against that an operator keeps heads elsewhere and hands them to `verify`.
"""

from deployments.trust.audit.log import AuditOptions
from deployments.trust.audit.record import AuditEvent
from deployments.trust.audit.writer import AuditWriter

__all__ = ["AuditEvent", "AuditOptions", "AuditWriter"]
