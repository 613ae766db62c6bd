"""The kernels under AddressSanitizer and UBSan, driven by a program of their own: `sanitizers/harness.cpp`."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from engine.native.build import COMPILER, INSTRUCTION_SETS, KERNELS_DIR

HARNESS = Path(__file__).parent / "sanitizers" / "harness.cpp"
FLAGS = (
    "-std=c++17", "-O1", "-g1", "-fopenmp", "-fno-math-errno", "-ffp-contract=off",
    "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{KERNELS_DIR}",
)  # fmt: skip
NUM_LINES = 7


@pytest.fixture
def harness(instruction_set: str, pytestconfig: pytest.Config) -> Path:
    """The program, compiled once for its sources and flags: that takes ten seconds and more."""
    command = [COMPILER, *FLAGS, *INSTRUCTION_SETS[instruction_set].compiler_flags, str(HARNESS)]
    digest = hashlib.sha256("\0".join(command).encode())
    for source in (HARNESS, *sorted(KERNELS_DIR.iterdir())):
        digest.update(source.read_bytes())
    program = pytestconfig.cache.mkdir("sanitizers") / f"{instruction_set}-{digest.hexdigest()[:16]}"
    if not program.exists():
        part = program.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", str(part)], check=True)
        part.replace(program)
    return program


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    return subprocess.run([program, *arguments], capture_output=True, text=True, env=environment, timeout=120)


def test_kernels_touch_no_byte_that_is_not_theirs(harness: Path, instruction_set: str) -> None:
    result = run(harness)
    assert (result.returncode, result.stderr) == (0, "")
    *parts, last = result.stdout.splitlines()
    assert len(parts) == NUM_LINES
    assert all(line.startswith(f"{instruction_set}: ") for line in parts)
    assert last == "clean"


def test_harness_sees_a_single_float_too_many(harness: Path) -> None:
    result = run(harness, "overrun")
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
