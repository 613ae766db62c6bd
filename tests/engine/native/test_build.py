"""The compiler is the real one, behind a script that counts its runs; the kernels are a stand-in that compiles fast."""

from __future__ import annotations

import logging
import os
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.errors import NativeUnavailable
from engine.native import build
from engine.native.abi import ABI_VERSION
from engine.native.build import INSTRUCTION_SETS, load_kernels
from engine.native.cache import file_lock

OF_ANOTHER_PATH = f"it is of ABI {ABI_VERSION} for avx9, not {ABI_VERSION} for portable"
STAND_IN = """
#include <stdint.h>
extern "C" int64_t zs_tile_bytes(int32_t kind) { return 7; }
extern "C" void* zs_create(const void*, void*, int32_t, int32_t) { return 0; }
extern "C" void zs_destroy(void*) {}
extern "C" void zs_step(void*, const void*) {}
extern "C" int64_t zs_scratch_bytes(const void*) { return 0; }
extern "C" const char* zs_path() {
#if defined(ZS_PATH_AVX512)
  return "avx512";
#elif defined(ZS_PATH_AVX2)
  return "avx2";
#elif defined(ZS_PATH_PORTABLE)
  return "portable";
#endif
}
extern "C" int32_t zs_abi_version() { return ABI; }
extern "C" void zs_scrub(void*) {}
"""

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


class Compiler:
    """A `g++` at the head of the PATH. `compilations` counts those that make something."""

    def __init__(self, directory, monkeypatch):
        self._log = directory / "log"
        self._script = directory / "bin" / "g++"
        self._script.parent.mkdir()
        self._real = shutil.which("g++")
        self.write(f'exec {self._real} "$@"')
        monkeypatch.setenv("PATH", f"{self._script.parent}:{os.environ['PATH']}")

    def write(self, compiling: str, version: str | None = None):
        answer = f'exec {self._real} "$@"' if version is None else f"echo {version}; exit 0"
        lines = ["#!/bin/sh", f'if [ "$1" = --version ]; then {answer}; fi', f"echo . >> {self._log}", compiling]
        self._script.write_text("\n".join(lines))
        self._script.chmod(0o755)

    @property
    def compilations(self) -> int:
        return len(self._log.read_text().split()) if self._log.exists() else 0


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    return Compiler(tmp_path, monkeypatch)


@pytest.fixture
def kernels_dir(tmp_path):
    directory = tmp_path / "kernels"
    directory.mkdir()
    (directory / "engine.cpp").write_text(f"#define ABI {ABI_VERSION}{STAND_IN}")
    return directory


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def library_file(cache_dir):
    (path,) = cache_dir.glob("*.so")
    return path


def test_kernels_are_compiled_once_and_then_found(compiler, kernels_dir, cache_dir, caplog):
    for _ in range(3):
        library = load_kernels(cache_dir, "portable", kernels_dir=kernels_dir)
        assert library.zs_path() == b"portable"
        assert library.zs_tile_bytes(0) == 7
    assert compiler.compilations == 1
    assert warnings_of(caplog) == []
    assert sorted(path.suffix for path in cache_dir.iterdir()) == [".lock", ".so"]
    assert stat.S_IMODE(cache_dir.stat().st_mode) == 0o700


def test_each_instruction_set_that_this_cpu_has_is_compiled_for_itself(compiler, kernels_dir, cache_dir):
    cpu = build._read_cpu()
    names = [name for name, wanted in INSTRUCTION_SETS.items() if cpu.flags.issuperset(wanted.needs)]
    for name in names:
        assert load_kernels(cache_dir, name, kernels_dir=kernels_dir).zs_path().decode() == name
    assert compiler.compilations == len(names)
    assert load_kernels(cache_dir, kernels_dir=kernels_dir).zs_path().decode() == names[0]
    assert compiler.compilations == len(names)


def test_change_of_sources_compiler_or_cpu_compiles_again(compiler, kernels_dir, cache_dir, monkeypatch):
    load_kernels(cache_dir, "portable", kernels_dir=kernels_dir)
    (kernels_dir / "more.h").write_text("// another header")
    load_kernels(cache_dir, "portable", kernels_dir=kernels_dir)
    assert compiler.compilations == 2
    compiler.write(f'exec {compiler._real} "$@"', version="g++ 99.1")
    load_kernels(cache_dir, "portable", kernels_dir=kernels_dir)
    assert compiler.compilations == 3
    monkeypatch.setattr(build, "_read_cpu", lambda: build._CPU("another CPU", frozenset()))
    load_kernels(cache_dir, "portable", kernels_dir=kernels_dir)
    assert compiler.compilations == 4
    load_kernels(cache_dir, "portable", kernels_dir=kernels_dir)
    assert compiler.compilations == 4


def replace(path, data):
    """A new file: the old one's pages belong to a library in use."""
    path.unlink()
    path.write_bytes(data)


def sealed(library):
    return build._sealed(library, build.find_compiler().version)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:], "its checksum does not hold"),
        (lambda data: data[: len(data) // 2], "its checksum does not hold"),
        (lambda data: b"", "its checksum does not hold"),
        (lambda data: sealed(b"not a library"), "invalid ELF header|file too short"),
    ],
)
def test_damaged_library_is_compiled_again_with_one_line(damage, message, compiler, kernels_dir, cache_dir, caplog):
    load_kernels(cache_dir, "portable", kernels_dir=kernels_dir)
    path = library_file(cache_dir)
    replace(path, damage(path.read_bytes()))
    assert load_kernels(cache_dir, "portable", kernels_dir=kernels_dir).zs_path() == b"portable"
    assert compiler.compilations == 2
    (line,) = warnings_of(caplog)
    assert f"{path} is not usable (" in line
    assert any(part in line for part in message.split("|"))
    load_kernels(cache_dir, "portable", kernels_dir=kernels_dir)
    assert compiler.compilations == 2


def test_library_of_another_path_is_compiled_again(compiler, kernels_dir, cache_dir, tmp_path, caplog):
    load_kernels(cache_dir, "portable", kernels_dir=kernels_dir)
    other = tmp_path / "other"
    shutil.copytree(kernels_dir, other)
    (other / "engine.cpp").write_text((kernels_dir / "engine.cpp").read_text().replace('"portable"', '"avx9"'))
    with pytest.raises(NativeUnavailable, match=f"do not load: {OF_ANOTHER_PATH}"):
        load_kernels(tmp_path / "elsewhere", "portable", kernels_dir=other)
    path = library_file(cache_dir)
    made = tmp_path / "avx9.so"
    job = build._Job(build.find_compiler(), ("-shared", "-fPIC", "-DZS_PATH_PORTABLE"), other, "portable")
    job._compile(made)
    replace(path, sealed(made.read_bytes()))
    assert load_kernels(cache_dir, "portable", kernels_dir=kernels_dir).zs_path() == b"portable"
    assert compiler.compilations == 4  # with one elsewhere and the foreign one
    (line,) = warnings_of(caplog)
    assert OF_ANOTHER_PATH in line


def test_library_of_another_abi_is_refused(compiler, kernels_dir, cache_dir):
    (kernels_dir / "engine.cpp").write_text(f"#define ABI 999{STAND_IN}")
    with pytest.raises(NativeUnavailable, match="the compiled kernels do not load: it is of ABI 999"):
        load_kernels(cache_dir, "portable", kernels_dir=kernels_dir)
    assert list(cache_dir.glob("*.so")) == []


def test_library_without_a_function_is_refused(compiler, kernels_dir, cache_dir):
    source = kernels_dir / "engine.cpp"
    source.write_text(source.read_text().replace("zs_scrub", "zs_scour"))
    with pytest.raises(NativeUnavailable, match="undefined symbol: zs_scrub"):
        load_kernels(cache_dir, "portable", kernels_dir=kernels_dir)


@pytest.fixture
def no_compiler(compiler, tmp_path, monkeypatch):
    """Call it to take the compiler off the PATH."""
    return lambda: monkeypatch.setenv("PATH", str(tmp_path))


def test_no_compiler_is_a_named_reason(no_compiler, kernels_dir, cache_dir):
    no_compiler()
    with pytest.raises(NativeUnavailable, match=r"no g\+\+ on the PATH to compile its kernels"):
        load_kernels(cache_dir, kernels_dir=kernels_dir)
    assert not cache_dir.exists()


def test_without_a_compiler_the_library_in_the_cache_serves(no_compiler, kernels_dir, cache_dir, caplog):
    load_kernels(cache_dir, "portable", kernels_dir=kernels_dir)
    no_compiler()
    cache_dir.chmod(0o500)  # as in an image that is only read
    try:
        assert load_kernels(cache_dir, "portable", kernels_dir=kernels_dir).zs_tile_bytes(0) == 7
    finally:
        cache_dir.chmod(0o700)
    assert warnings_of(caplog) == []


def test_with_a_compiler_that_does_not_start_too(compiler, kernels_dir, cache_dir):
    load_kernels(cache_dir, "portable", kernels_dir=kernels_dir)
    compiler._script.write_text("#!/nowhere/sh\n")
    assert load_kernels(cache_dir, "portable", kernels_dir=kernels_dir).zs_tile_bytes(0) == 7


def test_without_a_compiler_a_library_of_other_sources_or_another_cpu_does_not_serve(
    no_compiler, kernels_dir, cache_dir, monkeypatch
):
    load_kernels(cache_dir, "portable", kernels_dir=kernels_dir)
    no_compiler()
    with monkeypatch.context() as patched:
        patched.setattr(build, "_read_cpu", lambda: build._CPU("another CPU", frozenset()))
        with pytest.raises(NativeUnavailable, match=r"no g\+\+"):
            load_kernels(cache_dir, "portable", kernels_dir=kernels_dir)
    (kernels_dir / "more.h").write_text("// another header")
    with pytest.raises(NativeUnavailable, match=r"no g\+\+"):
        load_kernels(cache_dir, "portable", kernels_dir=kernels_dir)


def test_without_a_compiler_a_damaged_library_is_refused_with_one_line(no_compiler, kernels_dir, cache_dir, caplog):
    load_kernels(cache_dir, "portable", kernels_dir=kernels_dir)
    path = library_file(cache_dir)
    replace(path, path.read_bytes()[:-1])
    no_compiler()
    with pytest.raises(NativeUnavailable, match=r"no g\+\+"):
        load_kernels(cache_dir, "portable", kernels_dir=kernels_dir)
    (line,) = warnings_of(caplog)
    assert f"{path} is not usable (its checksum does not hold)" in line


def test_without_a_compiler_a_library_that_others_can_write_is_refused(no_compiler, kernels_dir, cache_dir, caplog):
    load_kernels(cache_dir, "portable", kernels_dir=kernels_dir)
    cache_dir.chmod(0o777)
    no_compiler()
    with pytest.raises(NativeUnavailable, match=r"no g\+\+"):
        load_kernels(cache_dir, "portable", kernels_dir=kernels_dir)
    (line,) = warnings_of(caplog)
    assert "is not used" in line
    assert "can be written by other users" in line


def test_compiler_that_does_not_start_is_a_named_reason(compiler, kernels_dir, cache_dir):
    compiler._script.write_text("#!/nowhere/sh\n")
    with pytest.raises(NativeUnavailable, match=r"g\+\+ does not run"):
        load_kernels(cache_dir, kernels_dir=kernels_dir)


def test_compile_error_is_named_by_its_first_line(compiler, kernels_dir, cache_dir):
    (kernels_dir / "engine.cpp").write_text("int broken = ;\nint worse(")
    with pytest.raises(NativeUnavailable, match=r"its kernels do not compile: .*engine.cpp:1:14: error: expected"):
        load_kernels(cache_dir, "portable", kernels_dir=kernels_dir)
    assert compiler.compilations == 1
    assert [path.suffix for path in cache_dir.iterdir()] == [".lock"]


def test_missing_sources_are_a_named_reason(compiler, cache_dir, tmp_path):
    with pytest.raises(NativeUnavailable, match=r"its kernels do not compile: .*error"):
        load_kernels(cache_dir, kernels_dir=tmp_path / "nowhere")


def test_compilation_that_takes_too_long_is_given_up(compiler, kernels_dir, cache_dir, monkeypatch):
    monkeypatch.setattr(build, "COMPILE_TIMEOUT_S", 0.2)
    compiler.write("exec sleep 60")
    with pytest.raises(NativeUnavailable, match="compiling its kernels took over 0 s"):
        load_kernels(cache_dir, kernels_dir=kernels_dir)


def test_cache_that_cannot_be_written_compiles_for_this_process_alone(compiler, kernels_dir, tmp_path, caplog):
    (tmp_path / "file").touch()
    library = load_kernels(tmp_path / "file" / "cache", "portable", kernels_dir=kernels_dir)
    assert library.zs_path() == b"portable"
    (line,) = warnings_of(caplog)
    assert "the compiled kernels cannot be stored" in line


def test_library_in_a_directory_that_others_can_write_is_not_loaded(compiler, kernels_dir, cache_dir, caplog):
    load_kernels(cache_dir, "portable", kernels_dir=kernels_dir)
    cache_dir.chmod(0o777)
    load_kernels(cache_dir, "portable", kernels_dir=kernels_dir)
    assert compiler.compilations == 2
    (line,) = warnings_of(caplog)
    assert "can be written by other users" in line


def test_no_room_anywhere_is_a_named_reason(compiler, kernels_dir, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(NativeUnavailable, match="its kernels cannot be compiled"):
        load_kernels(tmp_path / "file" / "cache", "portable", kernels_dir=kernels_dir)


def test_of_concurrent_loads_one_compiles_and_the_others_wait(compiler, kernels_dir, cache_dir):
    load_kernels(cache_dir, "portable", kernels_dir=kernels_dir)
    path = library_file(cache_dir)
    path.unlink()
    with ThreadPoolExecutor(4) as pool:
        with file_lock(path.with_suffix(".lock"), 1.0):
            loads = [pool.submit(load_kernels, cache_dir, "portable", kernels_dir=kernels_dir) for _ in range(4)]
            with pytest.raises(TimeoutError):
                loads[0].result(0.3)
            assert compiler.compilations == 1
        assert [load.result(60).zs_path() for load in loads] == [b"portable"] * 4
    assert compiler.compilations == 2


ALL_AVX512 = frozenset(INSTRUCTION_SETS["avx512"].needs)


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [
        (ALL_AVX512, "avx512"),
        (ALL_AVX512 | {"amx_tile"}, "avx512"),
        (ALL_AVX512 - {"avx512_bf16"}, "avx2"),
        (ALL_AVX512 - {"avx512_vnni"}, "avx2"),
        (ALL_AVX512 - {"fma"}, "portable"),
        ({"avx2", "fma", "f16c"}, "avx2"),
        ({"sse2"}, "portable"),
        (frozenset(), "portable"),
    ],
)
def test_best_instruction_set_of_the_cpu_is_chosen(flags, chosen):
    assert build._choose(None, build._CPU("some CPU", frozenset(flags))) == chosen


def test_instruction_set_that_the_cpu_lacks_is_a_named_reason():
    cpu = build._CPU("some CPU", ALL_AVX512 - {"avx512_bf16"})
    with pytest.raises(NativeUnavailable, match="this CPU has no avx512_bf16, which avx512 needs"):
        build._choose("avx512", cpu)
    with pytest.raises(ValueError, match="instruction set 'mmx' is not one of avx512, avx2, portable"):
        build._choose("mmx", cpu)
