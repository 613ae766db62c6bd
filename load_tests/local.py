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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    """A deployment that answers. `key_file` is its first principal's, `key_files` are those of all by name."""

    url: str
    key_file: Path
    pid: int = 0
    key_files: Mapping[str, Path] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        return _bearer(self.key_file)

    def headers_of(self, principal: str) -> dict[str, str]:
        return _bearer(self.key_files[principal])


def _bearer(key_file: Path) -> dict[str, str]:
    return {"Authorization": f"Bearer {key_file.read_text(encoding='utf-8').strip()}"}


@contextmanager
def local_server(
    directory: Path,
    *,
    config: Path = LOCAL_CONFIG,
    principals: Sequence[Mapping[str, Any]] = (PRINCIPAL,),
    trust: Mapping[str, Any] | None = None,
) -> Iterator[Server]:
    """Start `zoneserve serve` on a free port with keys of its own; end that process, and no other, on leaving.

    Args:
        directory: Gets the configuration, the keys (mode 0600) and the server's log.
        config: The configuration to start from; port and keys are replaced.
        principals: Entries of the keys file, each without its digest. A key each.
        trust: Keys of the section `trust` that replace the configuration's; None as a value removes the key.

    Raises:
        ServerError: Not healthy within `START_TIMEOUT_S`, or the process ended.
    """
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port()
    prepared, key_files = _prepare(directory, config, port, principals, trust)
    _share_shipped_texts(directory, list(dict.fromkeys(entry["tenant"] for entry in principals)))
    log_file = directory / "serve.log"
    command = [str(Path(sys.executable).with_name("zoneserve")), "serve", "--config", str(prepared)]
    with log_file.open("wb") as log:
        # A session of its own: Ctrl-C ends the measurement first, which then stops the server in order.
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            first = key_files[principals[0]["principal"]]
            server = Server(f"http://127.0.0.1:{port}", first, process.pid, key_files)
            wait_until_ok(f"{server.url}/health", process, log_file, START_TIMEOUT_S)
            yield server
        finally:
            stop(process)


def _prepare(
    directory: Path,
    config: Path,
    port: int,
    principals: Sequence[Mapping[str, Any]] = (PRINCIPAL,),
    trust: Mapping[str, Any] | None = None,
) -> tuple[Path, dict[str, Path]]:
    """Write configuration and keys; returns (configuration file, files with the clients' keys by principal)."""
    keys_file, master_key_file = directory / "keys.yaml", directory / "master.key"
    key_files: dict[str, Path] = {}
    entries = []
    for principal in principals:
        key = f"zs-{secrets.token_urlsafe(32)}"
        key_file = directory / f"key-{principal['principal']}"
        _write_private(key_file, key)
        key_files[principal["principal"]] = key_file
        entries.append({"sha256": hashlib.sha256(key.encode()).hexdigest(), **principal})
    _write_private(keys_file, yaml.safe_dump({"keys": entries}, sort_keys=False))
    _write_private(master_key_file, secrets.token_hex(32))

    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    settings["ingress"] = settings.get("ingress", {}) | {"host": "127.0.0.1", "port": port}
    own_paths: dict[str, Any] = {
        "keys_file": str(keys_file.absolute()),
        "master_key_file": str(master_key_file.absolute()),
        "create_missing": False,
        "manifests_dir": str((directory / MANIFESTS).absolute()),
        "manifest_keys_file": str((directory / MANIFEST_KEYS).absolute()),
        "audit": {"dir": str((directory / "audit").absolute())},
    }
    if "state_dir" in settings["trust"]:
        own_paths["state_dir"] = str((directory / "state").absolute())
    merged = settings["trust"] | own_paths | dict(trust or {})
    settings["trust"] = {name: value for name, value in merged.items() if value is not None}
    prepared = directory / "config.yaml"
    prepared.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return prepared, key_files


def _share_shipped_texts(directory: Path, tenants: Sequence[str]) -> None:
    """Sign them for the callers' tenants with a key of this folder's, as a local start does for its own."""
    zoneserve = str(Path(sys.executable).with_name("zoneserve"))
    key, trusted = directory / "manifest-signing.pem", directory / MANIFEST_KEYS
    commands = [
        ["publish-shipped", "--tenant", tenant, "--plan", PLAN, "--key", str(key), "--trusted", str(trusted),
         "--approver", "zoneserve", "--out", str(directory / MANIFESTS)]
        for tenant in tenants
    ]  # fmt: skip
    if not key.exists():
        zones = ["public", *(f"tenant/{tenant}/plan/*" for tenant in tenants)]
        named = [part for zone in zones for part in ("--zone", zone)]
        commands.insert(0, ["keygen", str(key), *named, "--trusted", str(trusted)])
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
