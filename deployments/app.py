"""The Serve application: ingress -> decode -> prefill. `build` is what KubeRay and the CLI both run."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from cluster.placement import ray_actor_options
from cluster.roles import Role
from deployments.config import PoolSection, ZoneserveConfig, load_config, require_context
from deployments.decode import DecodeReplica
from deployments.ingress import ingress_deployment
from deployments.prefill import PrefillReplica
from deployments.settings import SERVE_TRANSPORT, read_settings
from engine import model_store
from engine.checkpoint import load_checkpoint

HEALTH_CHECK_PERIOD_S = 2.0
HEALTH_CHECK_TIMEOUT_S = 15.0
GRACEFUL_SHUTDOWN_TIMEOUT_S = 20.0
GRACEFUL_SHUTDOWN_POLL_S = 0.2  # Serve's own 2 s is how long an idle replica takes to end
REPLICA_ENVIRONMENT = SERVE_TRANSPORT | {
    "OMP_WAIT_POLICY": "passive",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "PYTHON_DOTENV_DISABLED": "1",
}


class BuildArgs(BaseModel):
    """Arguments of the application in a Serve config file."""

    model_config = ConfigDict(extra="forbid")

    config_path: str


def build(args: BuildArgs) -> Application:
    """Application from a config file; the model must be in the cache or at its path on every node."""
    return build_application(load_config(Path(args.config_path)))


def build_application(config: ZoneserveConfig) -> Application:
    """The graph. Paths are made absolute here: replicas run in other working directories.

    Raises:
        CheckpointError: The model cannot be served; a replica's own refusal would reach nobody but its log.
        ConfigError: The model's context is shorter than the configuration's.
    """
    model_path = model_store.resolve(config.model.name, read_settings().model_cache).absolute()
    require_context(config, load_checkpoint(model_path).config.max_position)
    config = config.model_copy(update={"trust": config.trust.absolute()})
    prefill = None
    if config.mode == "disaggregated":
        prefill = _pool(Role.PREFILL, PrefillReplica, config, config.prefill).bind(config, str(model_path))
    decode = _pool(Role.DECODE, DecodeReplica, config, config.decode).bind(config, str(model_path), prefill)
    ingress = serve.deployment(
        ingress_deployment(config),
        name=str(Role.INGRESS),
        num_replicas=config.ingress.replicas,
        max_ongoing_requests=config.ingress.max_ongoing_requests,
        ray_actor_options=ray_actor_options(
            num_cpus=config.ingress.num_cpus, labels=config.ingress.labels, env_vars=_environment(1)
        ),
        graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=GRACEFUL_SHUTDOWN_POLL_S,
    )
    application: Application = ingress.bind(decode, prefill, config, str(model_path))
    return application


def _pool(role: Role, replica: type, config: ZoneserveConfig, pool: PoolSection) -> Any:
    return serve.deployment(
        replica,
        name=str(role),
        num_replicas=pool.replicas,
        max_ongoing_requests=pool.max_ongoing_requests,
        ray_actor_options=ray_actor_options(
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus,
            labels=pool.labels,
            env_vars=_environment(pool.num_threads),
        ),
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=GRACEFUL_SHUTDOWN_POLL_S,
        request_router_config=RequestRouterConfig(
            request_router_class="deployments.routing.serve_router:ZoneAffinityRouter",
            request_router_kwargs={"max_imbalance": config.routing.affinity_max_imbalance},
        ),
    )


def _environment(num_threads: int) -> dict[str, str]:
    return REPLICA_ENVIRONMENT | {"OMP_NUM_THREADS": str(num_threads)}
