"""The embedded default: a whole deployment on this machine, with a Ray of its own that ends with it."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from deployments.config import ConfigError, ZoneserveConfig
from deployments.settings import prepare_ray_environment
from deployments.trust.audit.files import AuditDirectory, AuditError
from deployments.trust.epochs import EPOCHS_NAME, EpochError, EpochStore
from deployments.trust.keyring import read_keyring
from deployments.trust.manifest import ManifestError
from deployments.trust.manifest_floors import FLOORS_NAME, FloorError, read_floors
from deployments.trust.manifest_keys import TrustedKeys, create_signing_key, read_signing_key
from deployments.trust.manifest_keys import trust as trust_key
from deployments.trust.policy import DEFAULT_POLICY, PolicyError, load_policy
from deployments.trust.principals import Principals, create_missing_keys
from deployments.trust.shareable import PublicationVetoed, publish_shipped
from engine.zone import PUBLIC

OBJECT_STORE_BYTES = 150 << 20
READY_TIMEOUT_S = 120.0
READY_POLL_S = 0.1
CLIENT_KEY_FILE = Path("out/local-key")
APPLICATION = "zoneserve"
SIGNING_KEY_NAME = "manifest-signing.pem"
SHIPPED_APPROVER = "zoneserve"


class LocalDeploymentError(Exception):
    """The deployment could not be started; the message says why."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a deployment answers, and the key that opens it."""

    url: str
    key: str


@contextmanager
def local_deployment(config: ZoneserveConfig, *, client_key_file: Path = CLIENT_KEY_FILE) -> Iterator[Endpoint]:
    """Start Ray and the application, wait until it is healthy, end both on leaving.

    Raises:
        LocalDeploymentError: The port is taken, or the deployment did not become healthy in time.
        ConfigError: Key files are missing and may not be made; the policy or the audit directory cannot be used; the
            shipped texts cannot be shared. KeyFileError: A key file cannot be used.
    """
    prepare_ray_environment()
    key = _client_key(config, client_key_file)
    _prepare_trust(config)
    _require_free_port(config.ingress.host, config.ingress.port)
    import ray
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from deployments.app import build_application

    application = build_application(config)
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, math.ceil(_logical_cpus(config))),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    try:
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(http_options={"host": config.ingress.host, "port": config.ingress.port})
        serve.run(application, name=APPLICATION)
        url = f"http://{config.ingress.host}:{config.ingress.port}"
        _wait_until_healthy(url)
        try:
            yield Endpoint(url, key)
        finally:
            with suppress(RayError, RayServeException, TimeoutError):  # whatever state it is in, it ends now
                serve.delete(APPLICATION)  # in order: the audit logs end with an anchor
    except RuntimeError as error:
        raise LocalDeploymentError(f"the deployment did not start: {error}") from error
    finally:
        ray.shutdown()


def _client_key(config: ZoneserveConfig, client_key_file: Path) -> str:
    keys_file, master_key_file = config.trust.keys_file, config.trust.master_key_file
    if config.trust.create_missing and master_key_file is not None:
        create_missing_keys(keys_file, master_key_file, client_key_file)
    for path in (keys_file, master_key_file):
        if path is not None and not path.is_file():
            raise ConfigError(f"{path}: the key file is missing (trust.create_missing would make it)")
    Principals.from_file(keys_file)
    read_keyring(master_key_file)
    return client_key_file.read_text(encoding="utf-8").strip() if client_key_file.is_file() else ""


def _prepare_trust(config: ZoneserveConfig) -> None:
    """Check what a replica could only refuse into its log; with `create_missing`, sign the shipped texts for every
    tenant of the keys file, with a key that is made beside the trusted ones.

    Raises:
        ConfigError: The policy, the audit directory or what is kept cannot be used, or the texts cannot be signed.
        KeyFileError: A key cannot be used.
    """
    try:
        load_policy(config.trust.policy_file or DEFAULT_POLICY)
        if config.trust.audit is not None:
            AuditDirectory(config.trust.audit.dir, create=True).close()
        if config.trust.state_dir is not None:
            read_floors(config.trust.state_dir / FLOORS_NAME)
            EpochStore(config.trust.state_dir / EPOCHS_NAME)
    except (PolicyError, AuditError, FloorError, EpochError) as error:
        raise ConfigError(str(error)) from error
    folder, trusted_file = config.trust.manifests_dir, config.trust.manifest_keys_file
    if folder is None or trusted_file is None:
        return
    if config.trust.create_missing:
        try:
            _publish_shipped(config, folder, trusted_file)
        except (ManifestError, PublicationVetoed, OSError) as error:
            raise ConfigError(f"{folder}: the shipped texts cannot be shared: {error}") from error
    TrustedKeys.from_file(trusted_file)


def _publish_shipped(config: ZoneserveConfig, folder: Path, trusted_file: Path) -> None:
    tenants = Principals.from_file(config.trust.keys_file).tenants
    key_file = trusted_file.with_name(SIGNING_KEY_NAME)
    key = read_signing_key(key_file) if key_file.exists() else create_signing_key(key_file)
    trust_key(trusted_file, key.public_key(), [PUBLIC.path, *(f"tenant/{tenant}/plan/*" for tenant in tenants)])
    folder.mkdir(parents=True, exist_ok=True)
    for tenant in tenants:
        publish_shipped(
            folder,
            key,
            TrustedKeys.from_file(trusted_file),
            tenant=tenant,
            plans=[config.claims.plan],
            approver=SHIPPED_APPROVER,
            now=time.time(),
        )


def _logical_cpus(config: ZoneserveConfig) -> float:
    pools = [config.decode] + ([config.prefill] if config.mode == "disaggregated" else [])
    return config.ingress.replicas * config.ingress.num_cpus + sum(pool.replicas * pool.num_cpus for pool in pools)


def _require_free_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise LocalDeploymentError(f"{host}:{port} cannot be used: {error.strerror}") from error


def _wait_until_healthy(url: str) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    reason = "no answer"
    while time.monotonic() < deadline:
        try:
            response = httpx.get(f"{url}/health", timeout=10.0)
            if response.status_code == 200:
                return
            reason = response.text
        except httpx.HTTPError as error:
            reason = type(error).__name__
        time.sleep(READY_POLL_S)
    raise LocalDeploymentError(f"not healthy within {READY_TIMEOUT_S:.0f} s: {reason}")
