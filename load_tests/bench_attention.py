"""Speed at which a decode step's attention reads a cold KV cache, beside plain reads of the same memory.

The model is one layer of nothing but KV: with a hidden size of 32 its weights are kilobytes. B sequences fill a cache
far larger than the processor's, their blocks scattered over it. Three readers of the same bytes, in turn: a decode
step; sums over the same pieces in the order in which attention takes them (KV head, sequence, block); and sums from
the first byte to the last. Prints counts, GB/s (10^9 bytes) as medians and ranges, and, last, one line of JSON.

    python -m load_tests.bench_attention --threads 1 2
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.model_runner import DEFAULT_CACHE_DIR
from engine.native import abi
from engine.native.build import find_compiler, load_kernels
from engine.native.mapping import zeroed_buffer
from engine.native.tiles import from_values, to_tiles

BATCH_SIZE = 16
BLOCK_SIZE = 16
HIDDEN_SIZE = 32
VOCAB_SIZE = 32
BYTES_PER_VALUE = 2
PATTERN_VALUES = 1 << 22
COMPILE_TIMEOUT_S = 60.0

# The sums are returned, and so no read can be left out.
READER = """
#include <stdint.h>
extern "C" uint64_t sum_pieces(const char* base, const int64_t* offsets, int64_t count, int64_t bytes, int threads) {
  uint64_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
  for (int64_t i = 0; i < count; i++) {
    const uint64_t* words = (const uint64_t*)(base + offsets[i]);
    uint64_t sum = 0;
    for (int64_t j = 0; j < bytes / 8; j++) sum += words[j];
    total += sum;
  }
  return total;
}
"""


@dataclass(frozen=True)
class Shape:
    """A cache of `num_blocks`, `blocks_each` of them for each sequence: each block (KV heads, 2, S, D) bfloat16."""

    num_kv_heads: int
    queries_per_head: int
    head_dim: int
    blocks_each: int

    @classmethod
    def of(cls, num_bytes: int, num_kv_heads: int, queries_per_head: int, head_dim: int) -> Shape:
        """The largest of at most `num_bytes`."""
        one = cls(num_kv_heads, queries_per_head, head_dim, 1)
        return cls(num_kv_heads, queries_per_head, head_dim, num_bytes // one.num_bytes)

    @property
    def slab_bytes(self) -> int:
        """Keys and values of one KV head in one block."""
        return 2 * BLOCK_SIZE * self.head_dim * BYTES_PER_VALUE

    @property
    def num_blocks(self) -> int:
        return BATCH_SIZE * self.blocks_each

    @property
    def num_bytes(self) -> int:
        """Of the cache, all of which a step reads."""
        return self.num_blocks * self.num_kv_heads * self.slab_bytes

    @property
    def context_tokens(self) -> int:
        return self.blocks_each * BLOCK_SIZE


class Cache:
    """KV of random values, and which block holds which part of which sequence."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.buffer = zeroed_buffer(shape.num_bytes)
        pattern = torch.randn(PATTERN_VALUES, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        for part in self.buffer.view(torch.bfloat16).split(PATTERN_VALUES):
            part.copy_(pattern[: len(part)])
        order = np.random.default_rng(0).permutation(shape.num_blocks).astype(np.int32)
        self.tables = order.reshape(BATCH_SIZE, shape.blocks_each)

    def offsets_in_order(self) -> NDArray[np.int64]:
        """Of the slabs, as attention takes them: KV head, sequence, block."""
        heads = np.arange(self.shape.num_kv_heads)[:, None, None]
        slabs = self.tables[None].astype(np.int64) * self.shape.num_kv_heads + heads
        return np.ascontiguousarray(slabs.reshape(-1) * self.shape.slab_bytes)

    def offsets_from_the_start(self) -> NDArray[np.int64]:
        return np.arange(self.shape.num_blocks * self.shape.num_kv_heads, dtype=np.int64) * self.shape.slab_bytes


class DecodeStep:
    """A step of one new token for each sequence, in the kernels of the best instruction set."""

    def __init__(self, cache: Cache, num_threads: int) -> None:
        self._library = load_kernels(DEFAULT_CACHE_DIR / "native")
        self.arithmetic = f"native-{self._library.zs_path().decode()}"
        self._cache = cache
        self._kept: list[Any] = []  # what the kernels hold addresses of
        model = self._model(cache.shape)
        self._engine: int | None = self._library.zs_create(
            ctypes.byref(model), cache.buffer.data_ptr(), BATCH_SIZE, num_threads
        )
        assert self._engine, "the kernels refuse the shape"
        self._step = self._decode_step(cache)

    def run(self) -> None:
        self._library.zs_step(self._engine, ctypes.byref(self._step))

    def close(self) -> None:
        self._library.zs_destroy(self._engine)

    def _model(self, shape: Shape) -> abi.Model:
        num_heads = shape.num_kv_heads * shape.queries_per_head
        query_size, kv_size = num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        ones = self._vector(torch.ones(HIDDEN_SIZE))
        layer = abi.Layer(
            input_norm=ones,
            mlp_norm=ones,
            q=self._matrix(query_size, HIDDEN_SIZE),
            k=self._matrix(kv_size, HIDDEN_SIZE),
            v=self._matrix(kv_size, HIDDEN_SIZE),
            output=self._matrix(HIDDEN_SIZE, query_size),
            gate_up=self._matrix(2 * HIDDEN_SIZE, HIDDEN_SIZE),
            down=self._matrix(HIDDEN_SIZE, HIDDEN_SIZE),
        )
        layers = (abi.Layer * 1)(layer)
        embedding = self._matrix(VOCAB_SIZE, HIDDEN_SIZE)
        self._kept.append(layers)
        return abi.Model(
            num_layers=1,
            hidden_size=HIDDEN_SIZE,
            intermediate_size=HIDDEN_SIZE,
            num_heads=num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            vocab_size=VOCAB_SIZE,
            block_size=BLOCK_SIZE,
            rms_norm_eps=1e-5,
            inverse_frequencies=self._vector(torch.rand(shape.head_dim // 2)),
            final_norm=ones,
            embedding=embedding,
            head=embedding,
            layers=layers,
        )

    def _decode_step(self, cache: Cache) -> abi.Step:
        each, context = cache.shape.blocks_each, cache.shape.context_tokens
        chunks = np.array([(row, 1, context - 1, row * each) for row in range(BATCH_SIZE)], np.int32)
        token_ids = np.arange(BATCH_SIZE, dtype=np.int32)
        tables = np.ascontiguousarray(cache.tables)
        self._kept += [chunks, token_ids, tables]
        return abi.Step(
            num_rows=BATCH_SIZE,
            num_chunks=BATCH_SIZE,
            num_sampled=0,
            token_ids=token_ids.ctypes.data,
            chunks=chunks.ctypes.data,
            block_tables=tables.ctypes.data,
        )

    def _vector(self, values: torch.Tensor) -> int:
        self._kept.append(values)
        return values.data_ptr()

    def _matrix(self, rows: int, columns: int) -> abi.Matrix:
        groups = from_values("a matrix", np.random.default_rng(rows).normal(0, 0.1, (rows, columns)).astype(np.float32))
        tiles = torch.from_numpy(to_tiles(groups).reshape(-1).view(np.uint8)).clone()  # torch aligns to 64 bytes
        return abi.Matrix(self._vector(tiles), rows, columns, groups.kind, 0)


class Reader:
    """Plain reads, as fast as the compiler makes them for this machine."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            source, made = Path(scratch) / "reader.cpp", Path(scratch) / "reader.so"
            source.write_text(READER)
            flags = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
            command = [find_compiler().path, *flags, "-o", str(made), str(source)]
            subprocess.run(command, check=True, timeout=COMPILE_TIMEOUT_S)
            self._sum_pieces = ctypes.CDLL(str(made)).sum_pieces
        self._sum_pieces.restype = ctypes.c_uint64
        self._sum_pieces.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]

    def sum(self, cache: Cache, offsets: NDArray[np.int64], num_threads: int) -> int:
        """Of the 64-bit words of the slabs at `offsets`, modulo 2^64."""
        address, slab_bytes = cache.buffer.data_ptr(), cache.shape.slab_bytes
        found: int = self._sum_pieces(address, offsets.ctypes.data, len(offsets), slab_bytes, num_threads)
        return found


def measure(cache: Cache, threads: list[int], repeats: int) -> dict[str, Any]:
    """GB/s of each reader and number of threads; each repeat takes all of them in turn."""
    reader, steps = Reader(), {count: DecodeStep(cache, count) for count in threads}
    in_order, from_the_start = cache.offsets_in_order(), cache.offsets_from_the_start()
    assert reader.sum(cache, in_order, 1) == reader.sum(cache, from_the_start, 1), "the readers do not read the same"
    runs: dict[str, Callable[[int], object]] = {
        "decode step": lambda count: steps[count].run(),
        "plain, in its order": lambda count: reader.sum(cache, in_order, count),
        "plain, from the start": lambda count: reader.sum(cache, from_the_start, count),
    }
    speeds: dict[str, dict[int, list[float]]] = {name: {count: [] for count in threads} for name in runs}
    for repeat in range(repeats + 1):
        for count in threads:
            for name, run in runs.items():
                started = time.perf_counter()
                run(count)
                seconds = time.perf_counter() - started
                if repeat:  # the first one starts the threads
                    speeds[name][count].append(round(cache.shape.num_bytes / seconds / 1e9, 2))
    for step in steps.values():
        step.close()
    shape = cache.shape
    return {
        "arithmetic": steps[threads[0]].arithmetic,
        "batch_size": BATCH_SIZE,
        "context_tokens": shape.context_tokens,
        "num_blocks": shape.num_blocks,
        "bytes": shape.num_bytes,
        "kv_heads": shape.num_kv_heads,
        "queries_per_head": shape.queries_per_head,
        "head_dim": shape.head_dim,
        "repeats": repeats,
        "gb_s": speeds,
    }


def table(report: dict[str, Any]) -> str:
    counts = list(next(iter(report["gb_s"].values())))
    lines = [
        f"B={report['batch_size']}, context {report['context_tokens']}: {report['bytes'] / 2**20:.0f} MiB of KV in "
        f"{report['num_blocks']} blocks of {BLOCK_SIZE} tokens; {report['kv_heads']} KV heads of "
        f"{report['head_dim']}, {report['queries_per_head']} queries each ({report['arithmetic']})",
        f"{'GB/s, median and range':<24}" + "".join(f"{f'{count} threads':>26}" for count in counts),
    ]
    for name, by_count in report["gb_s"].items():
        cells = [
            f"{statistics.median(found):.1f} ({min(found):.1f} to {max(found):.1f})" for found in by_count.values()
        ]
        lines.append(f"{name:<24}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024, help="of KV; far more than the last cache holds")
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--queries-per-head", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(arguments)
    shape = Shape.of(options.mib << 20, options.kv_heads, options.queries_per_head, options.head_dim)
    report = measure(Cache(shape), options.threads, options.repeats)
    print(table(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
