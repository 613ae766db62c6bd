"""How near each backend's logits are to float32 over the same weights, on 2,000 tokens of the sample claims' prompts.

Teacher-forced: at every position the distribution of the next token, given the text as it is. Both sides compute
with the weights that the native backend takes a file for, dequantised. Prints a table and, last, one line of JSON.

    python -m load_tests.accuracy --threads 2
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path

import torch

from deployments.claims.history import with_history
from deployments.claims.intake import ClaimIntake
from deployments.claims.model import Pseudonymiser
from deployments.claims.plan import load_plan
from deployments.claims.prompt import assemble
from deployments.claims.rules import evaluate, load_edit_table
from engine.attention import PagedKVCache, StepAttention
from engine.checkpoint import load_checkpoint
from engine.kv_cache import KVCacheLayout
from engine.model_config import ModelConfig
from engine.model_runner import DEFAULT_CACHE_DIR, ModelRunner, load_runner
from engine.model_store import resolve
from engine.native.build import INSTRUCTION_SETS
from engine.native.packing import open_packed
from engine.scheduler import ScheduledChunk
from engine.tokenizer import Tokenizer
from engine.torch_model import TorchModel

NUM_TOKENS = 2000
BLOCK_SIZE = 16
BATCH_SIZE = 16
BACKENDS = ("native", "torch")

# What the native backend promises: nats, share, share.
MAX_KL = 0.005
MIN_TOP1 = 0.985
MAX_PERPLEXITY_CHANGE = 0.005

_PLAN = "synthetic-ppo"


@dataclass(frozen=True, slots=True)
class Agreement:
    """A backend against float32, over the positions of one text.

    `kl`: mean KL divergence of the backend from float32, nats; `kl_p99` its 99th percentile. `top1`: share of
    positions with the same most likely token. Perplexities are of the text.
    """

    num_tokens: int
    kl: float
    kl_p99: float
    top1: float
    perplexity: float
    reference_perplexity: float

    @property
    def perplexity_change(self) -> float:
        return self.perplexity / self.reference_perplexity - 1

    @property
    def holds(self) -> bool:
        """Within what the native backend promises."""
        return self.kl <= MAX_KL and self.top1 >= MIN_TOP1 and abs(self.perplexity_change) <= MAX_PERPLEXITY_CHANGE


def claims_tokens(tokenizer: Tokenizer, count: int) -> tuple[int, ...]:
    """The first tokens of a chat that holds the rules, the plan and one sample claim after the other.

    Raises:
        ValueError: There are not so many.
    """
    plan, table = load_plan(_PLAN), load_edit_table()
    intake = ClaimIntake(Pseudonymiser(bytes(32), "sample"))
    with as_file(files("deployments.claims") / "samples") as directory:
        claims = [claim for path in sorted(directory.glob("*.edi")) for claim in intake.read_file(path).claims]
    messages = []
    for claim, history in with_history(claims):
        found = evaluate(
            claim, table=table, timely_filing_days=plan.timely_filing_days, plan_ref=plan.name, history=history
        )
        prompt = assemble(claim, found, history, tenant="sample", plan=plan)
        messages.append({"role": "user", "content": prompt.user})
    token_ids = tokenizer.encode_chat([{"role": "system", "content": prompt.system}, *messages]).token_ids
    if len(token_ids) < count:
        raise ValueError(f"the sample claims make {len(token_ids)} tokens, not {count}")
    return token_ids[:count]


@torch.inference_mode()
def reference_logits(
    config: ModelConfig, tensors: Mapping[str, torch.Tensor], token_ids: Sequence[int]
) -> torch.Tensor:
    """(T, vocab_size) by the torch model in float32, in one chunk."""
    layout = KVCacheLayout(config.num_layers, config.num_kv_heads, config.head_dim, BLOCK_SIZE, "float32")
    num_blocks = layout.num_blocks_for(len(token_ids))
    buffer = torch.zeros(num_blocks * layout.block_bytes, dtype=torch.uint8)
    chunk = ScheduledChunk("reference", 0, tuple(token_ids), tuple(range(num_blocks)), True)
    attention = StepAttention(PagedKVCache(buffer, layout, num_blocks), [chunk], config.head_dim**-0.5)
    positions = torch.arange(len(token_ids))
    model = TorchModel(config, tensors, dtype=torch.float32, device="cpu")
    return model.forward(torch.tensor(token_ids), positions, attention, positions)


def forced_logits(runner: ModelRunner, token_ids: Sequence[int]) -> Iterator[torch.Tensor]:
    """Logits after every token, `BATCH_SIZE` rows at a time.

    The text is computed once as a prompt. Then each token is again, alone in a chunk, as in decoding: it writes
    what is there already.
    """
    tokens = tuple(token_ids)
    table = tuple(range(runner.layout.num_blocks_for(len(tokens))))
    runner.execute([ScheduledChunk("text", 0, tokens, table, False)])
    chunks = [ScheduledChunk(str(i), i, tokens[i : i + 1], table, True) for i in range(len(tokens))]
    for first in range(0, len(chunks), BATCH_SIZE):
        yield runner.execute(chunks[first : first + BATCH_SIZE])


def compare(reference: torch.Tensor, rows: Iterator[torch.Tensor], token_ids: Sequence[int]) -> Agreement:
    """`reference`: (T, vocab_size). `rows`: the backend's, in the same order, some at a time."""
    divergences, same, losses = [], [], []
    next_tokens = torch.tensor([*token_ids[1:], 0])
    first = 0
    for logits in rows:
        part = slice(first, first + len(logits))
        ours, exact = logits.double().log_softmax(-1), reference[part].double().log_softmax(-1)
        divergences.append((exact.exp() * (exact - ours)).sum(-1))
        same.append(logits.argmax(-1) == reference[part].argmax(-1))
        chosen = next_tokens[part].unsqueeze(-1)
        losses.append(torch.cat((-ours.gather(-1, chosen), -exact.gather(-1, chosen)), -1))
        first += len(logits)
    kl = torch.cat(divergences)
    loss, reference_loss = torch.cat(losses)[:-1].mean(0).tolist()  # nothing is known to follow the last token
    return Agreement(
        num_tokens=first,
        kl=float(kl.mean()),
        kl_p99=float(kl.quantile(0.99)),
        top1=float(torch.cat(same).double().mean()),
        perplexity=math.exp(loss),
        reference_perplexity=math.exp(reference_loss),
    )


def measure(
    path: Path, backends: Sequence[str], num_tokens: int, cache_dir: Path, instruction_set: str | None = None
) -> dict[str, Agreement]:
    """Each backend in bfloat16 against float32, by the name of its arithmetic.

    Raises:
        CheckpointError: The model cannot be read.
        NativeUnavailable: The native backend has no form for its weights.
        SystemExit: A backend cannot run here.
    """
    checkpoint = load_checkpoint(path)
    weights = replace(checkpoint, tensors=open_packed(checkpoint, cache_dir / "packed").tensors())
    token_ids = claims_tokens(Tokenizer.from_path(checkpoint.tokenizer_source), num_tokens)
    reference = reference_logits(weights.config, weights.tensors, token_ids)
    agreements = {}
    for backend in backends:
        runner = load_runner(
            weights,
            dtype="bfloat16",
            block_size=BLOCK_SIZE,
            num_blocks=-(-num_tokens // BLOCK_SIZE),
            backend=backend,
            cache_dir=cache_dir,
            instruction_set=instruction_set,
        )
        if runner.fallback_reason is not None:
            raise SystemExit(f"the {backend} backend does not run here: {runner.fallback_reason}")
        agreements[runner.arithmetic] = compare(reference, forced_logits(runner, token_ids), token_ids)
    return agreements


def table(agreements: Mapping[str, Agreement]) -> str:
    lines = [f"{'against float32':<22}{'KL':>10}{'KL p99':>10}{'top-1':>9}{'perplexity':>12}{'change':>9}"]
    lines += [
        f"{name:<22}{row.kl:>10.5f}{row.kl_p99:>10.5f}{row.top1:>9.2%}{row.perplexity:>12.4f}{row.perplexity_change:>+9.3%}"
        for name, row in agreements.items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a named model or a path")
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--instruction-set", choices=tuple(INSTRUCTION_SETS), help="of the native backend; default: the best"
    )
    parser.add_argument("--cache-dir", type=Path, default=DEFAULT_CACHE_DIR)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    agreements = measure(
        resolve(options.model), options.backends, options.tokens, options.cache_dir, options.instruction_set
    )
    print(table(agreements))
    rows = {
        name: {**asdict(row), "perplexity_change": row.perplexity_change, "holds": row.holds}
        for name, row in agreements.items()
    }
    print(json.dumps({"num_tokens": options.tokens, "against": "float32", "results": rows}))


if __name__ == "__main__":
    main()
