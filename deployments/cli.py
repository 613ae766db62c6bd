"""The `zoneserve` command: fetch a model, serve, review claims, check, publish what is shared, read the audit log."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import httpx
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deployments.config import BUNDLED, ConfigError, ZoneserveConfig, find_config, load_config, shipped_names
from deployments.settings import read_settings
from deployments.trust.audit.cli import audit_app
from deployments.trust.zone_cli import zone_app
from engine.errors import CheckpointError

if TYPE_CHECKING:
    from deployments.local import Endpoint

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Disaggregated LLM serving with trust-zoned prefix reuse, for claim review.",
)
model_app = typer.Typer(no_args_is_help=True, help="Models in the local cache.")
cluster_app = typer.Typer(no_args_is_help=True, help="Kubernetes manifests.")
app.add_typer(model_app, name="model")
app.add_typer(cluster_app, name="cluster")
app.add_typer(zone_app, name="zone")
app.add_typer(audit_app, name="audit")

out = Console()
err = Console(stderr=True)

CONFIG_HELP = f"The deployment's YAML file, or the name of a shipped one: {', '.join(shipped_names())}."
ConfigOption = Annotated[Path, typer.Option("--config", "-c", help=CONFIG_HELP)]
PortOption = Annotated[int | None, typer.Option("--port", "-p", min=1, max=65535, help="Overrides ingress.port.")]
LOCAL_CONFIG = BUNDLED / "local.yaml"
HEALTH_TIMEOUT_S = 10.0


def main() -> None:
    """Entry point: deliberate errors become one line and exit status 1 or 2."""
    from deployments.local import LocalDeploymentError
    from deployments.review_client import ReviewClientError
    from deployments.trust.key_files import KeyFileError

    try:
        app()
    except (ConfigError, KeyFileError, CheckpointError, LocalDeploymentError, ReviewClientError) as error:
        err.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


@model_app.command("fetch")
def model_fetch(name: Annotated[str, typer.Argument(help="A catalogue name, for example smollm2.")]) -> None:
    """Bring a model into the local cache and check its digest; offline afterwards."""
    from engine import model_store

    path = model_store.fetch(name, read_settings().model_cache)
    out.print(f"{name}: {path}", highlight=False, soft_wrap=True)


@app.command()
def serve(config: ConfigOption = LOCAL_CONFIG, port: PortOption = None) -> None:
    """Start a local deployment and stay up until interrupted."""
    from deployments.local import CLIENT_KEY_FILE, local_deployment

    settings = _with_port(load_config(find_config(config)), port)
    stop = threading.Event()
    with ExitStack() as stack:
        with out.status("starting the deployment"):
            endpoint = stack.enter_context(local_deployment(settings))
        for number in (signal.SIGINT, signal.SIGTERM):  # after Ray, which sets handlers of its own
            signal.signal(number, lambda *_: stop.set())
        _say_fallbacks(endpoint, settings)
        out.print(f"serving [bold]{settings.model.served_name}[/] at {endpoint.url}", highlight=False)
        out.print(
            f"bearer key: {CLIENT_KEY_FILE}   metrics: {endpoint.url}/metrics   stop: Ctrl-C",
            highlight=False,
            soft_wrap=True,
        )
        stop.wait()
        out.print("stopping")


@app.command()
def review(
    files: Annotated[list[Path] | None, typer.Argument(help="837P or JSON-lines files.")] = None,
    *,
    sample: Annotated[bool, typer.Option("--sample", help="Review the shipped synthetic claims.")] = False,
    config: ConfigOption = LOCAL_CONFIG,
    port: PortOption = None,
    url: Annotated[str | None, typer.Option(help="A deployment that is already up; none is started then.")] = None,
    key_file: Annotated[Path | None, typer.Option(help="File with the bearer key for --url.")] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Where reviews are written.")] = Path("out/reviews"),
) -> None:
    """Review claim files: one line a claim, `<claim>.json` and `<claim>.md` in the output folder."""
    from deployments.local import CLIENT_KEY_FILE, Endpoint, local_deployment
    from deployments.review_client import read_files, review_files, sample_files

    chosen = [*(sample_files() if sample else []), *(files or [])]
    if not chosen:
        raise typer.BadParameter("name at least one file, or pass --sample")
    files_read = read_files(chosen)
    with ExitStack() as stack:
        if url is not None:
            endpoint = Endpoint(url.rstrip("/"), _read_key(key_file or CLIENT_KEY_FILE))
        else:
            settings = _with_port(load_config(find_config(config)), port)
            with out.status(f"starting the deployment (Ray, ingress and engine replicas, {settings.mode})"):
                endpoint = stack.enter_context(local_deployment(settings))
            _say_fallbacks(endpoint, settings)
        is_complete = review_files(files_read, endpoint, out_dir, out)
    raise typer.Exit(0 if is_complete else 1)


@app.command()
def check(config: Annotated[Path, typer.Argument(help=CONFIG_HELP)] = LOCAL_CONFIG) -> None:
    """Validate a configuration and say what it would deploy; starts nothing."""
    from deployments.describe import describe

    path = find_config(config)
    out.print(describe(load_config(path), path))


@cluster_app.command("check")
def cluster_check(
    path: Annotated[Path | None, typer.Argument(help="A manifest, or a folder with a kustomization.")] = None,
    crds: Annotated[Path | None, typer.Option(help="Folder with KubeRay's CRDs (ZONESERVE_CRD_DIR).")] = None,
) -> None:
    """Validate manifests strictly: against the CRDs, Serve's schema, and each other."""
    from cluster.check import check_manifests

    target = path or Path(__file__).parent.parent / "cluster" / "manifests" / "base"
    crd_dir = crds or read_settings().crd_dir
    if crd_dir is not None and not crd_dir.is_dir():
        raise typer.BadParameter(f"{crd_dir} is not a folder", param_hint="--crds")
    findings = check_manifests(target, crd_dir)
    table = Table("file", "where", "finding", title=f"{len(findings)} findings in {target}")
    for finding in findings:
        table.add_row(str(finding.file), finding.path, finding.sentence)
    if crd_dir is None:
        out.print("no CRDs given: RayService was not checked against its schema (--crds)", highlight=False)
    if findings:
        out.print(table)
        raise typer.Exit(1)
    out.print(f"{target}: no findings", highlight=False, soft_wrap=True)


def _say_fallbacks(endpoint: Endpoint, settings: ZoneserveConfig) -> None:
    try:
        health = httpx.get(f"{endpoint.url}/health", timeout=HEALTH_TIMEOUT_S).raise_for_status().json()
    except (httpx.HTTPError, ValueError):  # it was healthy a moment ago; whoever uses it next says what is wrong
        return
    if (line := fallback_line(health["pools"], settings.engine.backend)) is not None:
        err.print(f"[bold yellow]warning:[/] {escape(line)}", highlight=False, soft_wrap=True)


def fallback_line(pools: Mapping[str, Sequence[Mapping[str, object]]], backend: str) -> str | None:
    """Why `pools`, as /health shows them, compute on torch and not on the configured backend; None where they do not.

    Pools that give the same reason are named together.
    """
    roles: dict[str, list[str]] = {}
    for role, replicas in pools.items():
        for reason in sorted({str(state["backend_fallback"]) for state in replicas if state["backend_fallback"]}):
            roles.setdefault(reason, []).append(role)
    if not roles:
        return None
    reasons = "; ".join(f"{' and '.join(names)}: {reason}" for reason, names in roles.items())
    return f"torch computes instead of the {backend} backend ({reasons})"


def _read_key(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror or error}", param_hint="--key-file") from error


def _with_port(config: ZoneserveConfig, port: int | None) -> ZoneserveConfig:
    if port is None:
        return config
    return config.model_copy(update={"ingress": config.ingress.model_copy(update={"port": port})})
