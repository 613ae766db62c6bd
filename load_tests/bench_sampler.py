"""Cost of choosing the tokens of one step: B rows, beside the decode step of the same batch.

Contexts and the step are the model's own. Prints three tables and, last, one line of JSON. Counts come first: how many
grammar masks were ready when the logits were, and how many the rows had to wait for. Then milliseconds for the whole
batch, medians: of the sampler alone, on the model's logits and on rows in which no token stands out, where a nucleus
holds most of the vocabulary; and of forward pass and sampler together with the masks computed on demand and ahead.

    python -m load_tests.bench_sampler --threads 1
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint import load_checkpoint
from engine.draw import NumpyRowChooser, RowChooser
from engine.model_runner import DEFAULT_CACHE_DIR, ModelRunner, load_runner
from engine.model_store import resolve
from engine.native.build import INSTRUCTION_SETS, load_kernels
from engine.native.sampling import NativeRowChooser
from engine.request import Request, SamplingParams
from engine.sampler import SampledToken, Sampler
from engine.scheduler import ScheduledChunk
from engine.tokenizer import Tokenizer

BATCH_SIZE = 16
CONTEXT_TOKENS = 512
BLOCK_SIZE = 16
STEPS_OF_ANSWER = 12
FLAT_DEVIATION = 0.5  # of the logits of flat rows

TEXT = (
    "The claim lists two lines for the same procedure on one day. The reviewer asks for the records of visit {row}. "
    "Line 1 bills 99213 with modifier 25, line 2 bills 20610; the plan allows one injection each week. "
)
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "risk": {"enum": ["none", "low", "high"]},
            "why": {"type": "string", "maxLength": 400},
            "lines": {"type": "array", "items": {"type": "integer"}, "maxItems": 5},
        },
        "required": ["risk", "why", "lines"],
        "additionalProperties": False,
    }
)
COSTLY_SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"code": {"type": "string", "pattern": "^([A-Z]{2}[0-9]{3}-(ab|cd|ef)+[a-z ]{0,40})+$"}},
        "required": ["code"],
        "additionalProperties": False,
    }
)
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top_k 40": {"temperature": 0.8, "top_k": 40},
    "top_p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "top_k 40, top_p 0.95": {"temperature": 0.8, "top_k": 40, "top_p": 0.95},
    "min_p 0.05": {"temperature": 0.8, "min_p": 0.05},
    "repetition penalty, top_k 40": {"temperature": 0.8, "top_k": 40, "repetition_penalty": 1.1},
    "greedy, 5 logprobs": {"logprobs": 5},
    "JSON start, greedy": {"json_schema": SCHEMA},
    "JSON text, greedy": {"json_schema": SCHEMA},
    "JSON text, top_k 40": {"json_schema": SCHEMA, "temperature": 0.8, "top_k": 40},
    "JSON text, top_p 0.95": {"json_schema": SCHEMA, "temperature": 0.8, "top_p": 0.95},
}
ANSWERS = {"JSON text": '{"risk": "low", "why": "The', "JSON code": '{"code": "AB123-ab'}
MASK_CASES: dict[str, dict[str, Any]] = {
    "JSON start": {"json_schema": SCHEMA, "temperature": 0.8, "top_k": 40},
    "JSON text": {"json_schema": SCHEMA, "temperature": 0.8, "top_k": 40},
    "JSON code, costly pattern": {"json_schema": COSTLY_SCHEMA, "temperature": 0.8, "top_k": 40},
}


@dataclass
class Model:
    """A runner whose cache holds the batch's contexts, and its tokenizer."""

    runner: ModelRunner
    tokenizer: Tokenizer
    prompts: list[tuple[int, ...]]

    @classmethod
    def load(cls, path: Path, backend: str) -> Model:
        tokenizer = Tokenizer.from_path(path)
        blocks_each = -(-(CONTEXT_TOKENS + 1) // BLOCK_SIZE)
        runner = load_runner(
            load_checkpoint(path),
            dtype="bfloat16",
            block_size=BLOCK_SIZE,
            num_blocks=BATCH_SIZE * blocks_each,
            backend=backend,
        )
        texts = [(TEXT * 20).format(row=row) for row in range(BATCH_SIZE)]
        model = cls(runner, tokenizer, [tuple(tokenizer.encode(text)[:CONTEXT_TOKENS]) for text in texts])
        for row, prompt in enumerate(model.prompts):
            runner.execute([ScheduledChunk(str(row), 0, prompt, model._blocks(row), True)])
        return model

    def step(self) -> torch.Tensor:
        """(B, V) logits after the last token of each context."""
        return self.runner.execute(
            [
                ScheduledChunk(str(row), CONTEXT_TOKENS - 1, prompt[-1:], self._blocks(row), True)
                for row, prompt in enumerate(self.prompts)
            ]
        )

    def requests(self, sampling: dict[str, Any], answer: str) -> list[Request]:
        output = self.tokenizer.encode(answer) if answer else ()
        return [
            Request(
                str(row),
                prompt,
                SamplingParams(max_tokens=4096, ignore_eos=True, seed=row, **sampling),
                output_token_ids=list(output),
            )
            for row, prompt in enumerate(self.prompts)
        ]

    def _blocks(self, row: int) -> tuple[int, ...]:
        blocks_each = self.runner.num_blocks // BATCH_SIZE
        return tuple(range(row * blocks_each, (row + 1) * blocks_each))


def answer_of(case: str) -> str:
    return next((answer for name, answer in ANSWERS.items() if case.startswith(name)), "")


def median_ms(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def flat_logits(vocab_size: int) -> torch.Tensor:
    """(B, V), normal."""
    return FLAT_DEVIATION * torch.randn(BATCH_SIZE, vocab_size, generator=torch.Generator().manual_seed(0))


def measure_sampler(model: Model, logits: torch.Tensor, chooser: RowChooser, repeats: int) -> dict[str, float]:
    """Milliseconds of `Sampler.sample` for each case; grammar masks are ready."""
    found = {}
    for case, sampling in CASES.items():
        sampler = Sampler(model.tokenizer, chooser)
        requests = model.requests(sampling, answer_of(case))
        for request in requests:
            sampler.add(request)

        def run(sampler: Sampler = sampler, requests: list[Request] = requests) -> None:
            failed = [item for item in sampler.sample(logits, requests) if not isinstance(item, SampledToken)]
            assert not failed, failed

        found[case] = round(median_ms(run, repeats), 3)
        sampler.close()
    return found


def measure_masks(model: Model, chooser: RowChooser, repeats: int) -> dict[str, dict[str, Any]]:
    """Forward pass and sampler over the first tokens of an answer, masks on demand and ahead, in turn."""
    found: dict[str, dict[str, Any]] = {}
    for case, sampling in MASK_CASES.items():
        times: dict[str, list[float]] = {"on demand": [], "ahead": []}
        counts: dict[str, dict[str, int]] = {}
        samplers = {mode: Sampler(model.tokenizer, chooser) for mode in times}
        for _ in range(repeats):
            for mode, sampler in samplers.items():
                times[mode] += answer_ms(model, sampler, model.requests(sampling, answer_of(case)), mode == "ahead")
                counts[mode] = {"ahead": sampler.num_masks_ahead, "on_demand": sampler.num_masks_on_demand}
        for sampler in samplers.values():
            sampler.close()
        found[case] = {
            "masks": counts,
            "step_ms": {mode: round(statistics.median(values), 3) for mode, values in times.items()},
            "p95_ms": {mode: round(statistics.quantiles(values, n=20)[-1], 3) for mode, values in times.items()},
        }
    return found


def answer_ms(model: Model, sampler: Sampler, requests: list[Request], ahead: bool) -> list[float]:
    """Milliseconds of each step; the logits are those of one context, whatever was sampled."""
    for request in requests:
        sampler.add(request)
    times = []
    for _ in range(STEPS_OF_ANSWER):
        started = time.perf_counter()
        if ahead:
            sampler.prepare(requests)
        results = sampler.sample(model.step(), requests)
        times.append((time.perf_counter() - started) * 1e3)
        for request, item in zip(requests, results, strict=True):
            assert isinstance(item, SampledToken), item
            request.output_token_ids.append(item.token_id)
            sampler.accept(request, item.token_id)
    for request in requests:
        sampler.remove(request.request_id)
    return times


def choosers(names: list[str]) -> dict[str, RowChooser]:
    return {
        name: NumpyRowChooser()
        if name == "numpy"
        else NativeRowChooser(load_kernels(DEFAULT_CACHE_DIR / "native", name))
        for name in names
    }


def table(report: dict[str, Any]) -> str:
    lines = [
        f"B={BATCH_SIZE}, context {CONTEXT_TOKENS}: step {report['step_ms']:.2f} ms ({report['arithmetic']}, "
        f"{report['threads']} threads); 5 % of it is {report['step_ms'] / 20:.2f} ms",
    ]
    for title, by_name in (("sampler, ms", report["sampler_ms"]), ("on flat rows, ms", report["flat_ms"])):
        lines += ["", f"{title:<32}" + "".join(f"{name:>10}" for name in by_name) + f"{'share':>9}"]
        for case in CASES:
            values = [found[case] for found in by_name.values()]
            share = values[-1] / report["step_ms"]
            lines.append(f"{case:<32}" + "".join(f"{value:>10.3f}" for value in values) + f"{share:>9.1%}")
    lines += ["", f"{'step with masks, ms':<32}{'on demand':>10}{'ahead':>10}{'p95':>10}{'p95':>10}{'ready':>9}"]
    for case, row in report["masks"].items():
        ready = row["masks"]["ahead"]
        lines.append(
            f"{case:<32}{row['step_ms']['on demand']:>10.2f}{row['step_ms']['ahead']:>10.2f}"
            f"{row['p95_ms']['on demand']:>10.2f}{row['p95_ms']['ahead']:>10.2f}"
            f"{ready['ahead'] / (ready['ahead'] + ready['on_demand']):>9.0%}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a named model or a path")
    parser.add_argument("--backend", default="native", help="of the forward pass")
    parser.add_argument(
        "--choosers", nargs="+", default=["numpy", next(iter(INSTRUCTION_SETS))], help="numpy or an instruction set"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = Model.load(resolve(options.model), options.backend)
    implementations = choosers(options.choosers)
    logits = model.step()
    flat = flat_logits(logits.shape[1])
    report = {
        "threads": options.threads,
        "arithmetic": model.runner.arithmetic,
        "repeats": options.repeats,
        "step_ms": round(median_ms(model.step, options.repeats), 3),
        "sampler_ms": {
            name: measure_sampler(model, logits, each, options.repeats) for name, each in implementations.items()
        },
        "flat_ms": {
            name: measure_sampler(model, flat, each, options.repeats) for name, each in implementations.items()
        },
        "masks": measure_masks(model, implementations[options.choosers[-1]], max(1, options.repeats // 5)),
    }
    print(table(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
