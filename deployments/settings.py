"""The one module that reads the environment."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

# How Serve's processes reach one another. A streamed token takes two hops (decode -> ingress -> proxy); over Ray's
# streaming generators they cost three times the CPU that gRPC does, and threads of their own for router and user code
# a quarter more. So a call that blocks in a replica blocks its health check: long work goes to a thread.
# The caller picks the way and a replica serves both: a process that disagrees is slow, not wrong.
SERVE_TRANSPORT = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment says, read once.

    `cache`: ZONESERVE_CACHE, else `zoneserve` in the XDG cache: compiled kernels and packed weights.
    `model_cache`: ZONESERVE_MODEL_CACHE, else `models` in it. `crd_dir`: ZONESERVE_CRD_DIR.
    """

    cache: Path
    model_cache: Path
    crd_dir: Path | None


def read_settings() -> Settings:
    environment = os.environ
    cache_home = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Path(environment.get("ZONESERVE_CACHE") or cache_home / "zoneserve")
    crd_dir = environment.get("ZONESERVE_CRD_DIR")
    return Settings(
        cache=cache,
        model_cache=Path(environment.get("ZONESERVE_MODEL_CACHE") or cache / "models"),
        crd_dir=Path(crd_dir) if crd_dir else None,
    )


def master_key_secret() -> str | None:
    """ZONESERVE_MASTER_KEY: master keys as their file would hold them. No part of the settings, which may be shown."""
    return os.environ.get("ZONESERVE_MASTER_KEY") or None


def prepare_ray_environment() -> None:
    """Set what Ray must find before it is imported: no usage reports, quiet logs, Serve's transport, this interpreter's
    tools."""
    defaults = SERVE_TRANSPORT | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",  # a fault must be in the log before the process ends
        "RAY_DEDUP_LOGS": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "OMP_WAIT_POLICY": "passive",
        "PYTHON_DOTENV_DISABLED": "1",  # x12sdk would read any .env file above its package
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    tools = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "")
    if path.split(os.pathsep)[0] != tools:
        os.environ["PATH"] = f"{tools}{os.pathsep}{path}"
