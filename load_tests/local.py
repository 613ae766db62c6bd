"""A local deployment in a process of its own, for the time of a measurement."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import yaml

ROOT = Path(__file__).parents[1]
LOCAL_CONFIG = ROOT / "deployments" / "configs" / "local.yaml"

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0
POLL_S = 0.5
LOG_TAIL_LINES = 20

MANIFESTS, MANIFEST_KEYS = "manifests", "manifest-keys.yaml"
PLAN = "synthetic-ppo"  # of the shipped configurations

# The zone must be one whose blocks may be found again by the same caller; a key without one caches nothing.
PRINCIPAL = {"principal": "load", "tenant": "load", "zone": "tenant/load/case/load"}


class ServerError(Exception):
    """The deployment did not start, or ended early. The message ends with the tail of its log."""


@dataclass(frozen=True, slots=True)
class Server:
    """A deployment that answers."""

    url: str
    key_file: Path
    pid: int = 0

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key_file.read_text(encoding='utf-8').strip()}"}


@contextmanager
def local_server(directory: Path, *, config: Path = LOCAL_CONFIG) -> Iterator[Server]:
    """Start `zoneserve serve` on a free port with keys of its own; end that process, and no other, on leaving.

    Args:
        directory: Gets the configuration, the keys (mode 0600) and the server's log.
        config: The configuration to start from; port and keys are replaced.

    Raises:
        ServerError: Not healthy within `START_TIMEOUT_S`, or the process ended.
    """
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port()
    prepared, key_file = _prepare(directory, config, port)
    _share_shipped_texts(directory)
    log_file = directory / "serve.log"
    command = [str(Path(sys.executable).with_name("zoneserve")), "serve", "--config", str(prepared)]
    with log_file.open("wb") as log:
        # A session of its own: Ctrl-C ends the measurement first, which then stops the server in order.
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            server = Server(f"http://127.0.0.1:{port}", key_file, process.pid)
            wait_until_ok(f"{server.url}/health", process, log_file, START_TIMEOUT_S)
            yield server
        finally:
            stop(process)


def _prepare(directory: Path, config: Path, port: int) -> tuple[Path, Path]:
    """Write configuration and keys; returns (configuration file, file with the client's key)."""
    key = f"zs-{secrets.token_urlsafe(32)}"
    key_file, keys_file, master_key_file = (directory / name for name in ("key", "keys.yaml", "master.key"))
    entry = {"sha256": hashlib.sha256(key.encode()).hexdigest(), **PRINCIPAL}
    _write_private(key_file, key)
    _write_private(keys_file, yaml.safe_dump({"keys": [entry]}, sort_keys=False))
    _write_private(master_key_file, secrets.token_hex(32))

    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    settings["ingress"] = settings.get("ingress", {}) | {"host": "127.0.0.1", "port": port}
    settings["trust"] = settings["trust"] | {
        "keys_file": str(keys_file.absolute()),
        "master_key_file": str(master_key_file.absolute()),
        "create_missing": False,
        "manifests_dir": str((directory / MANIFESTS).absolute()),
        "manifest_keys_file": str((directory / MANIFEST_KEYS).absolute()),
        "audit": {"dir": str((directory / "audit").absolute())},
    }
    prepared = directory / "config.yaml"
    prepared.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return prepared, key_file


def _share_shipped_texts(directory: Path) -> None:
    """Sign them for the caller's tenant with a key of this folder's, as a local start does for its own."""
    zoneserve = str(Path(sys.executable).with_name("zoneserve"))
    key, trusted = directory / "manifest-signing.pem", directory / MANIFEST_KEYS
    tenant = PRINCIPAL["tenant"]
    commands = [
        ["publish-shipped", "--tenant", tenant, "--plan", PLAN, "--key", str(key), "--trusted", str(trusted),
         "--approver", "zoneserve", "--out", str(directory / MANIFESTS)],
    ]  # fmt: skip
    if not key.exists():
        zones = ["--zone", "public", "--zone", f"tenant/{tenant}/plan/*"]
        commands.insert(0, ["keygen", str(key), *zones, "--trusted", str(trusted)])
    for command in commands:
        done = subprocess.run([zoneserve, "zone", *command], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ServerError(f"zoneserve zone {command[0]}: {done.stderr.strip()}")


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text + "\n")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_ok(url: str, process: subprocess.Popen[bytes], log_file: Path, timeout_s: float) -> None:
    """Until a GET of `url` gives 200.

    Raises:
        ServerError: The process ended, or it took longer.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(f"the server ended with status {process.returncode}:\n{tail(log_file)}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=10.0).status_code == httpx.codes.OK:
                return
        time.sleep(POLL_S)
    raise ServerError(f"the server did not answer within {timeout_s:.0f} s:\n{tail(log_file)}")


def tail(log_file: Path) -> str:
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-LOG_TAIL_LINES:]) or "(its log is empty)"


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the process to stop; after the limit, end the group that was started with it."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
