"""Bytes between two KV caches: tickets, one-sided block writes, verification, fences. Knows layouts, no server.

    protocol.py         what every connector promises, and the tree of errors
    wire.py             bounded msgpack: the only way a peer's bytes become objects here
    handshake.py        what two pools must agree on before bytes may move between them
    inbox.py            notifications until somebody takes them: early, duplicate, late
    sealing_keys.py     keys to seal and open with, while they are changed
    ticket.py           leave to write into somebody's blocks: sealed, single use
    digest.py           keyed digest of blocks, incremental
    notice.py           the 54 bytes which end a handoff: done, or aborted
    quarantine.py       blocks into which a write may still land
    handoff.py          one handoff: `PushSession` on the prefill side, `Landing` on the decode side
    nixl_connector.py   the connector; the only module that imports nixl
    local_connector.py  the same promises inside one process, with faults on demand: for tests

A handoff: decode issues a `Landing` (a sealed ticket); prefill opens it into a `PushSession`, pushes finished
blocks while it computes the next, and its last write carries a notice; decode verifies what landed and only then
decodes. When anything else happens, the blocks stay in quarantine until the fence: the proof that no write of
that session is live any more.
"""
