"""The command line as a user meets it: good and bad arguments, exit codes, one line for an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.cli import fallback_line
from deployments.config import BUNDLED


def zoneserve(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "from deployments.cli import main; main()"
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": root, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.model
def test_check_says_what_would_be_deployed(tmp_path: Path, smollm2_path: Path) -> None:
    result = zoneserve("check", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for text in ("disaggregated", "prefill", "decode", "360 KiB", "8192 tokens"):
        assert text in result.stdout


@pytest.mark.model
def test_check_takes_the_name_of_a_shipped_configuration(tmp_path: Path, smollm2_path: Path) -> None:
    result = zoneserve("check", "local-monolithic", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "monolithic" in result.stdout
    assert "prefill" not in result.stdout


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("mode: disaggregated\nmdoel: {}\n", "mdoel"),
        ("- a\n", "mapping"),
        ("a: [", "not YAML"),
        ((BUNDLED / "local.yaml").read_text().replace("num_blocks: 2048", "num_blocks: 16"), "decode.num_blocks"),
        ((BUNDLED / "local.yaml").read_text().replace("dtype: bfloat16", "dtype: int3"), "model.dtype"),
    ],
)
def test_check_refuses_a_bad_config_in_one_line(text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    result = zoneserve("check", "bad.yaml", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: bad.yaml: ")
    assert named in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        (("review",), 2, "--sample"),
        (("review", "missing.edi"), 1, "missing.edi"),
        (("review", "here.edi", "--url", "http://127.0.0.1:9", "--key-file", "missing"), 2, "missing"),
        (("review", "here.edi", "--url", "http://127.0.0.1:9", "--key-file", "here.edi"), 1, "does not answer"),
        (("model", "fetch", "nosuch"), 1, "nosuch"),
        (("serve", "--port", "0"), 2, "port"),
        (("serve", "--config", "nope"), 1, "local, local-monolithic"),
        (("review", "here.edi", "--config", "nope"), 1, "local, local-monolithic"),
        (("check", "nope"), 1, "local, local-monolithic"),
        (("cluster", "check", "--crds", "missing"), 2, "missing"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[str, ...], status: int, named: str, tmp_path: Path) -> None:
    (tmp_path / "here.edi").write_text("ISA*")
    result = zoneserve(*arguments, cwd=tmp_path)
    assert result.returncode == status, result.stderr
    assert named in result.stderr
    assert "Traceback" not in result.stderr


def test_a_fallback_is_one_line_for_all_pools_and_replicas() -> None:
    compiler, dtype, none = ({"backend_fallback": reason} for reason in ("no compiler", "only bfloat16", None))
    start = "torch computes instead of the native backend"
    assert fallback_line({"decode": [none, none], "prefill": [none]}, "native") is None
    assert fallback_line({"decode": [none, dtype, dtype]}, "native") == f"{start} (decode: only bfloat16)"
    assert (
        fallback_line({"decode": [compiler], "prefill": [compiler]}, "native")
        == f"{start} (decode and prefill: no compiler)"
    )
    assert (
        fallback_line({"decode": [compiler], "prefill": [dtype, none]}, "native")
        == f"{start} (decode: no compiler; prefill: only bfloat16)"
    )


def test_a_taken_port_is_said_before_anything_starts(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = zoneserve("serve", "--port", str(taken.getsockname()[1]), cwd=tmp_path)
    assert result.returncode == 1
    assert "cannot be used" in result.stderr


def test_the_shipped_manifests_have_no_findings(tmp_path: Path) -> None:
    result = zoneserve("cluster", "check", cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    assert "no findings" in result.stdout


def test_texts_are_published_and_audit_logs_read_by_the_same_command(tmp_path: Path) -> None:
    trusted = ("--trusted", "trusted.yaml")
    made = zoneserve("zone", "keygen", "key.pem", "--zone", "public", *trusted, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    listed = zoneserve("zone", "manifests", ".", *trusted, cwd=tmp_path)
    assert "set digest" in listed.stdout
    read = zoneserve("audit", "verify", ".", "--master-key-file", "none.key", cwd=tmp_path)
    assert (read.returncode, "none.key" in read.stderr) == (1, True)
