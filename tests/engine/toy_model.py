"""A model small enough to be its own oracle, behind the real runner and tokenizer interfaces.

The KV of a position holds its token, its position and a digest chained over the KV before it, written
through the block table; the logits are a hash of every byte of KV that the request's table leads to. A wrong,
stale, shared, foreign or scrubbed block therefore changes the next token. `ToyModel.continuation` computes
the same tokens with no cache at all.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from engine.block_hash import BlockHasher, HashContext
from engine.draw import NumpyRowChooser, RowChooser
from engine.engine import Engine, RequestOutput, Reservation
from engine.kv_cache import KVCacheLayout
from engine.quotas import NO_QUOTAS, Quotas
from engine.request import Request, SamplingParams
from engine.sampler import SampledToken
from engine.scheduler import ScheduledChunk, SchedulerConfig
from engine.tokenizer import Tokenizer
from engine.zone import PUBLIC, Zone, ZoneSpan

BLOCK_SIZE = 4
EOS = 95
VOCAB_SIZE = 96  # printable ASCII and the end
_WORDS = 4  # uint32 in K, and in V, of one position

PLAN = Zone.parse("tenant/acme/plan/gold")
CASE = Zone.parse("tenant/acme/case/c1")
OTHER_CASE = Zone.parse("tenant/acme/case/c2")
RIVAL_CASE = Zone.parse("tenant/rival/case/c1")


def toy_tokenizer() -> Tokenizer:
    """One token for each printable ASCII character, in order, then the end-of-sequence token."""
    spell = {chr(code): "Ġ" if code == 0x20 else chr(code) for code in range(0x20, 0x7F)}
    backend = Backend(models.BPE(vocab={text: index for index, text in enumerate(spell.values())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    return Tokenizer(backend, eos_token_ids=(EOS,))


class ToyModel:
    """The arithmetic: what a position's KV holds, and the logits that a context gives."""

    @staticmethod
    def kv(token_id: int, position: int, before: bytes) -> bytes:
        """K and V of one position; `before` is the V of the position before it."""
        key = struct.pack("<4I", token_id + 1, position + 1, 0xFFFFFFFF, 7)
        value = hashlib.blake2b(before + key, digest_size=4 * _WORDS).digest()
        return key + value

    @staticmethod
    def logits(context: bytes) -> np.ndarray:
        """(VOCAB_SIZE,) float32 from the KV of all positions."""
        drawn = hashlib.shake_128(context).digest(2 * VOCAB_SIZE)
        return np.frombuffer(drawn, np.uint16).astype(np.float32) / 4096.0

    @staticmethod
    def continuation(prompt: Sequence[int], count: int, *, ignore_eos: bool = False) -> list[int]:
        """The `count` greedy tokens that follow, or fewer where the end-of-sequence token comes."""
        context, value, output = b"", b"", list[int]()
        for position, token_id in enumerate(prompt):
            entry = ToyModel.kv(token_id, position, value)
            context, value = context + entry, entry[4 * _WORDS :]
        while len(output) < count:
            token_id = int(ToyModel.logits(context).argmax())
            output.append(token_id)
            if token_id == EOS and not ignore_eos:
                break
            entry = ToyModel.kv(token_id, len(prompt) + len(output) - 1, value)
            context, value = context + entry, entry[4 * _WORDS :]
        return output


class ToyRunner:
    """`ModelRunner` over a byte KV cache. `executed` keeps the chunks of every step."""

    def __init__(self, num_blocks: int, block_size: int = BLOCK_SIZE) -> None:
        self.layout = KVCacheLayout(
            num_layers=1, num_kv_heads=1, head_dim=_WORDS, block_size=block_size, dtype="float32"
        )
        self.num_blocks = num_blocks
        self.vocab_size = VOCAB_SIZE
        self.weights_digest = "toy"
        self.arithmetic = "toy"
        self.row_chooser: RowChooser = NumpyRowChooser()
        self.fallback_reason: str | None = None
        self.kv_buffer = torch.zeros(num_blocks * self.layout.block_bytes, dtype=torch.uint8)
        self.executed: list[tuple[ScheduledChunk, ...]] = []
        self.scrubbed: list[int] = []
        self.fault: Exception | None = None
        # (N blocks, {k,v}, S slots, bytes of one entry)
        self._slots = self.kv_buffer.numpy().reshape(num_blocks, 2, block_size, 4 * _WORDS)

    def execute(self, chunks: Sequence[ScheduledChunk]) -> torch.Tensor:
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        self.executed.append(tuple(chunks))
        for chunk in chunks:
            self._write(chunk)
        rows = [self._logits(chunk) for chunk in chunks if chunk.samples]
        return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, VOCAB_SIZE)

    def scrub(self, block_ids: Sequence[int]) -> None:
        assert len(set(block_ids)) == len(block_ids)
        self.scrubbed += block_ids
        self._slots[list(block_ids)] = 0

    def block(self, block_id: int) -> bytes:
        return self._slots[block_id].tobytes()

    def write_block(self, block_id: int, data: bytes) -> None:
        """What a peer's write does."""
        self._slots[block_id] = np.frombuffer(data, np.uint8).reshape(self._slots[block_id].shape)

    def _write(self, chunk: ScheduledChunk) -> None:
        for offset, token_id in enumerate(chunk.token_ids):
            position = chunk.start + offset
            before = b""
            if position:
                index, slot = divmod(position - 1, self.layout.block_size)
                before = self._slots[chunk.block_ids[index], 1, slot].tobytes()
            index, slot = divmod(position, self.layout.block_size)
            entry = np.frombuffer(ToyModel.kv(token_id, position, before), np.uint8)
            self._slots[chunk.block_ids[index], :, slot] = entry.reshape(2, -1)

    def _logits(self, chunk: ScheduledChunk) -> np.ndarray:
        end = chunk.start + len(chunk.token_ids)
        table = list(chunk.block_ids[: self.layout.num_blocks_for(end)])
        # (blocks, {k,v}, S, bytes) -> (positions, {k,v}, bytes)
        context = self._slots[table].transpose(0, 2, 1, 3).reshape(-1, 2, 4 * _WORDS)[:end]
        return ToyModel.logits(context.tobytes())


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def toy_hasher(key: bytes = b"k" * 32, **changes: str) -> BlockHasher:
    context = HashContext(weights_digest="toy", tokenizer_digest="toy", layout_fingerprint="toy", rope="none")
    return BlockHasher(key, replace(context, **changes))


class ToyEngine(Engine):
    """The real engine on a toy runner; keeps every output and its parts at hand."""

    def __init__(
        self, num_blocks: int = 64, block_size: int = BLOCK_SIZE, *, quotas: Quotas = NO_QUOTAS, **config: int
    ) -> None:
        self.runner = ToyRunner(num_blocks, block_size)
        self.clock = FakeClock()
        self.outputs: dict[str, list[RequestOutput]] = {}
        super().__init__(
            config=SchedulerConfig(**config),
            runner=self.runner,
            tokenizer=toy_tokenizer(),
            hasher=toy_hasher(),
            num_blocks=num_blocks,
            clock=self.clock,
            case_idle_ttl_s=900.0,
            quotas=quotas,
        )

    def step(self) -> list[RequestOutput]:
        outputs = super().step()
        self.keep(outputs)
        return outputs

    def keep(self, outputs: Iterable[RequestOutput]) -> None:
        for output in outputs:
            self.outputs.setdefault(output.request_id, []).append(output)

    def run(self, *requests: Request, max_steps: int = 2000) -> None:
        """Add the requests and step, checking, until nothing is left to do."""
        for request in requests:
            self.add_request(request)
        for _ in range(max_steps):
            if not self.has_work:
                return
            self.step()
            self.check()
        raise AssertionError(f"still busy after {max_steps} steps")

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs.get(request_id, ()) for token in output.token_ids]

    def text(self, request_id: str) -> str:
        return "".join(output.text for output in self.outputs.get(request_id, ()))

    def last(self, request_id: str) -> RequestOutput:
        return self.outputs[request_id][-1]


def tokens_of(seed: int, count: int) -> tuple[int, ...]:
    """A prompt that shares no block with that of another seed."""
    drawn = hashlib.shake_128(struct.pack("<q", seed)).digest(count)
    return tuple(byte % EOS for byte in drawn)


def make_request(
    request_id: str,
    prompt: Sequence[int],
    zone: Zone | Sequence[ZoneSpan] = PUBLIC,
    *,
    max_tokens: int = 8,
    ignore_eos: bool = True,
    priority: int = 0,
    epoch: int = 0,
    tenant: str = "",
    is_prefill_only: bool = False,
    output_token_ids: Sequence[int] = (),
    **sampling: object,
) -> Request:
    """A greedy request; `zone` labels the whole prompt, or gives its spans."""
    spans = (ZoneSpan(len(prompt), zone),) if isinstance(zone, Zone) else tuple(zone)
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, **sampling)  # type: ignore[arg-type]
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        sampling=params,
        zone_spans=spans,
        epoch=epoch,
        tenant=tenant,
        priority=priority,
        is_prefill_only=is_prefill_only,
        output_token_ids=list(output_token_ids),
    )


def send_prompt(source: ToyEngine, target: ToyEngine, reservation: Reservation, prefill_id: str) -> None:
    """Copy the blocks that the reservation names from the prefill request that computed them."""
    start = reservation.first_missing_block
    blocks = source.block_ids(prefill_id)[start : start + len(reservation.block_ids)]
    for source_id, target_id in zip(blocks, reservation.block_ids, strict=True):
        target.runner.write_block(target_id, source.runner.block(source_id))


def first_token(source: ToyEngine, prefill_id: str) -> SampledToken:
    return SampledToken(source.tokens(prefill_id)[0])
