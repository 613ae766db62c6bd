"""A second process with a NIXL connector, driven by JSON lines on its standard streams. Not a test itself."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import time
from typing import Any

from tests.transfer.support import CANARY, KEY, WEIGHTS, ZONE, block_bytes, make_pool
from transfer.handoff import HandoffSender, PushSession
from transfer.nixl_connector import NixlConnector
from transfer.protocol import TransferError
from transfer.ticket import Expectation, ReplayGuard, TicketSealer, TicketVerifier


class Peer:
    def __init__(self, role: str) -> None:
        self.pool = make_pool(fill=CANARY if role == "decode" else None)
        self.connector = NixlConnector(role, self.pool)
        self.session: PushSession | None = None

    async def handle(self, command: dict[str, Any]) -> object:
        match command["do"]:
            case "handshake":
                return self.connector.handshake().hex()
            case "connect":
                return await self.connector.connect(bytes.fromhex(command["handshake"]))
            case "write":
                receipt = await self.connector.write(
                    command["peer"], command["local"], command["remote"], timeout_s=command["timeout_s"]
                )
                return receipt.num_descriptors
            case "blocks":
                return [hashlib.sha256(block_bytes(self.pool, i)).hexdigest() for i in range(self.pool.num_blocks)]
            case "accept":
                await self.accept(command)
                return True
            case "push":
                assert self.session is not None
                self.session.push(command["blocks"])
                return True
            case "finish":
                assert self.session is not None
                return (await self.session.finish()).num_bytes
            case "close":
                return await self.connector.close(timeout_s=command["timeout_s"])
        raise ValueError(command["do"])

    async def accept(self, command: dict[str, Any]) -> None:
        sealer = TicketSealer((KEY,), time.time)
        verifier = TicketVerifier(
            sealer,
            ReplayGuard(time.time),
            layout_fingerprint=self.pool.layout.fingerprint(),
            weights_digest=WEIGHTS,
            agent_name=self.connector.name,
        )
        sender = HandoffSender(self.connector, verifier)
        sealed, handshake = bytes.fromhex(command["sealed"]), bytes.fromhex(command["handshake"])
        self.session = await sender.accept(sealed, handshake, Expectation(ZONE, 0))


async def main(role: str) -> None:
    peer = Peer(role)
    while line := await asyncio.to_thread(sys.stdin.readline):
        try:
            answer: object = {"ok": await peer.handle(json.loads(line))}
        except TransferError as error:
            answer = {"error": type(error).__name__}
        print(json.dumps(answer), flush=True)
    os._exit(0)  # no destructor runs: something may be live


if __name__ == "__main__":
    # NIXL would import torch, only to read its CUDA version; that takes seconds.
    sys.modules["torch"] = None  # type: ignore[assignment]
    asyncio.run(main(sys.argv[1]))
