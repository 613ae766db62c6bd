"""Compiles the kernels for this CPU at first use, keeps the library, loads it.

A library is kept under a hash of sources, flags and CPU. Behind it in its file stand the version of the compiler that
made it, and the SHA-256 of all that, since the loader may crash on a damaged one. Another compiler makes it anew; where
there is none, the library serves as it is.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from engine.errors import NativeUnavailable
from engine.native.abi import ABI_VERSION, bind
from engine.native.cache import file_lock, private_directory

COMPILER = "g++"
COMPILE_TIMEOUT_S = 300.0
LOCK_TIMEOUT_S = 600.0
VERSION_TIMEOUT_S = 30.0
MAX_ERROR_CHARS = 300
_NOT_STARTED = (126, 127)  # what env answers then
_SEPARATOR = b"\0"
_DIGEST_BYTES = 32
KERNELS_DIR = Path(__file__).parent / "kernels"

_COMMON_FLAGS = (
    "-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-ffp-contract=off", "-mtune=native",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _InstructionSet:
    """`needs`: flags of /proc/cpuinfo."""

    needs: tuple[str, ...]
    compiler_flags: tuple[str, ...]


# From the best to the one that runs everywhere.
INSTRUCTION_SETS = {
    "avx512": _InstructionSet(
        ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16", "fma", "f16c", "avx2"),
        (
            "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512bf16",
            "-mfma", "-mf16c", "-mavx2", "-DZS_PATH_AVX512",
        ),
    ),
    "avx2": _InstructionSet(("avx2", "fma", "f16c"), ("-mavx2", "-mfma", "-mf16c", "-DZS_PATH_AVX2")),
    "portable": _InstructionSet((), ("-DZS_PATH_PORTABLE",)),
}  # fmt: skip

logger = logging.getLogger(__name__)


def load_kernels(
    cache_dir: Path, instruction_set: str | None = None, *, kernels_dir: Path = KERNELS_DIR
) -> ctypes.CDLL:
    """The library of kernels, from the cache or compiled now; of several processes one compiles.

    Args:
        cache_dir: Made when missing. Where it cannot be written, or others can write it, the library is
            compiled for this process alone, with a line in the log.
        instruction_set: One of `INSTRUCTION_SETS`; None is the best that this CPU has.
        kernels_dir: Of `engine.cpp` and its headers.

    Raises:
        NativeUnavailable: No compiler and no library in the cache, a compilation that fails, or a CPU without the
            instruction set.
        ValueError: An unknown instruction set.
    """
    cpu = _read_cpu()
    name = _choose(instruction_set, cpu)
    flags = (*_COMMON_FLAGS, *INSTRUCTION_SETS[name].compiler_flags)
    path = cache_dir / f"{name}-{_key(kernels_dir, flags, cpu.model_name)}.so"
    try:
        compiler = find_compiler()
    except NativeUnavailable:
        found = _load_without_compiler(path, name)
        if found is None:
            raise
        return found
    job = _Job(compiler, flags, kernels_dir, name)
    try:
        private_directory(cache_dir)
        found = _load_cached(path, name, compiler.version)
        if found is not None:
            return found
        with file_lock(path.with_suffix(".lock"), LOCK_TIMEOUT_S):
            return _load_cached(path, name, compiler.version, warns=True) or job.compile_to(path)
    except OSError as error:
        logger.warning("the compiled kernels cannot be stored and are compiled for this process alone (%s)", error)
    try:
        return job.compile_to(None)
    except OSError as error:
        raise NativeUnavailable(f"its kernels cannot be compiled ({error})") from None


@dataclass(frozen=True, slots=True)
class Compiler:
    """`version`: the first line that it says of itself."""

    path: str
    version: str


@dataclass(frozen=True, slots=True)
class _Job:
    """One compilation."""

    compiler: Compiler
    flags: tuple[str, ...]
    kernels_dir: Path
    instruction_set: str

    def compile_to(self, path: Path | None) -> ctypes.CDLL:
        """Compile, load, and keep the library at `path`, or nowhere.

        Raises:
            NativeUnavailable: The compilation fails, or what it made does not load.
            OSError: There is no room for it, or the compiler cannot be started.
        """
        with tempfile.TemporaryDirectory(dir=None if path is None else path.parent, prefix=".compile-") as scratch:
            made = Path(scratch) / "kernels.so"
            self._compile(made)
            made.write_bytes(_sealed(made.read_bytes(), self.compiler.version))
            try:
                library = _bind(made, self.instruction_set)
            except _UnfitLibrary as error:
                raise NativeUnavailable(f"the compiled kernels do not load: {error}") from None
            if path is not None:
                os.replace(made, path)
        return library

    def _compile(self, target: Path) -> None:
        command = [self.compiler.path, *self.flags, "-o", str(target), str(self.kernels_dir / "engine.cpp")]
        try:
            result = _run(command, COMPILE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise NativeUnavailable(f"compiling its kernels took over {COMPILE_TIMEOUT_S:.0f} s") from None
        if result.returncode:
            raise NativeUnavailable(f"its kernels do not compile: {_first_error(result.stderr)}")


@dataclass(frozen=True, slots=True)
class _CPU:
    model_name: str
    flags: frozenset[str]


class _UnfitLibrary(Exception):
    """A library that cannot be used. The message says why."""


def _choose(instruction_set: str | None, cpu: _CPU) -> str:
    if instruction_set is None:
        return next(name for name, wanted in INSTRUCTION_SETS.items() if cpu.flags.issuperset(wanted.needs))
    if instruction_set not in INSTRUCTION_SETS:
        raise ValueError(f"instruction set {instruction_set!r} is not one of {', '.join(INSTRUCTION_SETS)}")
    missing = set(INSTRUCTION_SETS[instruction_set].needs) - cpu.flags
    if missing:
        raise NativeUnavailable(f"this CPU has no {', '.join(sorted(missing))}, which {instruction_set} needs")
    return instruction_set


def _read_cpu() -> _CPU:
    """Of the first processor in /proc/cpuinfo; a machine without one gets the portable path."""
    fields: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                fields.setdefault(key.strip(), value.strip())
    except OSError:
        return _CPU(platform.processor(), frozenset())
    return _CPU(fields.get("model name", platform.processor()), frozenset(fields.get("flags", "").split()))


def find_compiler() -> Compiler:
    """
    Raises:
        NativeUnavailable: There is none, or it does not run.
    """
    path = shutil.which(COMPILER)
    if path is None:
        raise NativeUnavailable(f"no {COMPILER} on the PATH to compile its kernels")
    try:
        result = _run([path, "--version"], VERSION_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise NativeUnavailable(f"{path} does not run ({error})") from None
    if result.returncode in _NOT_STARTED:
        raise NativeUnavailable(f"{path} does not run ({_first_error(result.stderr)})")
    return Compiler(path, result.stdout.partition("\n")[0])


def _key(kernels_dir: Path, flags: tuple[str, ...], cpu_model: str) -> str:
    parts = [text.encode() for text in (cpu_model, *flags)]
    for source in sorted((*kernels_dir.glob("*.h"), *kernels_dir.glob("*.cpp"))):
        parts += [source.name.encode(), source.read_bytes()]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


def _load_without_compiler(path: Path, instruction_set: str) -> ctypes.CDLL | None:
    if not path.exists():
        return None
    try:
        private_directory(path.parent)
    except OSError as error:
        logger.warning("%s is not used (%s)", path, error)
        return None
    return _load_cached(path, instruction_set, None, warns=True)


def _load_cached(
    path: Path, instruction_set: str, compiler_version: str | None, *, warns: bool = False
) -> ctypes.CDLL | None:
    """None where there is no library, one of another compiler (where one is named), or an unfit one; where it `warns`,
    the log says so of an unfit one."""
    try:
        version = _unsealed_version(path.read_bytes())
        if compiler_version not in (None, version):
            return None
        return _bind(path, instruction_set)
    except FileNotFoundError:
        return None
    except (OSError, _UnfitLibrary) as error:
        if warns:
            logger.warning("%s is not usable (%s)", path, error)
        return None


def _sealed(library: bytes, compiler_version: str) -> bytes:
    """The library as it is kept; the loader ignores what stands behind it."""
    data = library + _SEPARATOR + compiler_version.encode(errors="replace")
    return data + hashlib.sha256(data).digest()


def _unsealed_version(data: bytes) -> str:
    """Of the compiler that made a kept library.

    Raises:
        _UnfitLibrary: The file is damaged.
    """
    if hashlib.sha256(data[:-_DIGEST_BYTES]).digest() != data[-_DIGEST_BYTES:]:
        raise _UnfitLibrary("its checksum does not hold")
    return data[:-_DIGEST_BYTES].rpartition(_SEPARATOR)[2].decode(errors="replace")


def _bind(path: Path, instruction_set: str) -> ctypes.CDLL:
    try:
        library = bind(path)
    except (OSError, AttributeError) as error:
        raise _UnfitLibrary(str(error)) from None
    found = (library.zs_abi_version(), library.zs_path().decode())
    if found != (ABI_VERSION, instruction_set):
        raise _UnfitLibrary(f"it is of ABI {found[0]} for {found[1]}, not {ABI_VERSION} for {instruction_set}")
    return library


def _run(command: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    in_english = ["/usr/bin/env", "LC_ALL=C", *command]
    return subprocess.run(in_english, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False)


def _first_error(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip()] or ["the compiler gave no reason"]
    return next((line for line in lines if "error" in line), lines[0])[:MAX_ERROR_CHARS]
