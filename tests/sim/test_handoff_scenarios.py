"""Each thing that can go wrong in a handoff, alone: the right tokens or an honest error, and nothing left behind."""

from __future__ import annotations

from tests.engine.toy_model import ToyModel, tokens_of
from tests.sim.cluster import running_cluster
from tests.sim.virtual_time import run_in_virtual_time

PROMPT = tokens_of(1, 30)
NUM_BLOCKS = 8  # of PROMPT


def test_a_handoff_pushes_every_block_and_computes_nothing_on_decode() -> None:
    async def body() -> None:
        async with running_cluster() as cluster:
            answer = await cluster.answer(PROMPT)
            assert answer.tokens == ToyModel.continuation(PROMPT, 6, ignore_eos=True)
            assert answer.provenance is not None
            assert answer.provenance.pushed_blocks == NUM_BLOCKS
            assert answer.provenance.fallback is None
            assert answer.provenance.origins == {
                "decode_cache": 0, "prefill_cache": 0, "prefill_computed": 30, "decode_computed": 0
            }  # fmt: skip
            assert cluster.outcomes() == {"landed": 1}

    run_in_virtual_time(body())
