"""The configuration file: what loads, and the sentence for each thing that does not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from deployments.config import (
    BUNDLED,
    MAX_CONFIG_BYTES,
    ConfigError,
    ZoneserveConfig,
    find_config,
    load_config,
    parse_config,
    shipped_names,
)
from deployments.trust.audit import AuditOptions
from tests.deployments.support import local_config, local_document, write_yaml

SECTIONS = ["model", "engine", "prefill", "decode", "transfer", "routing", "ingress", "trust", "claims"]


def with_value(path: str, value: object) -> dict[str, Any]:
    document = local_document()
    *sections, key = path.split(".")
    target = document
    for section in sections:
        target = target[section]
    target[key] = value
    return document


def test_every_bundled_configuration_loads() -> None:
    paths = sorted(BUNDLED.glob("*.yaml"))
    assert BUNDLED / "local.yaml" in paths
    for path in paths:
        assert isinstance(load_config(path), ZoneserveConfig)


def test_local_configuration_says_what_its_file_says() -> None:
    config = load_config(BUNDLED / "local.yaml")
    assert config.mode == "disaggregated"
    assert config.decode.num_blocks == local_document()["decode"]["num_blocks"]
    assert config.trust.keys_file == Path(local_document()["trust"]["keys_file"])


def test_missing_sections_take_their_defaults() -> None:
    document = local_document()
    for name in ("engine", "transfer", "routing", "ingress", "claims", "mode"):
        document.pop(name, None)
    config = parse_config(document)
    assert config.mode == "disaggregated"
    assert config.engine.block_size == 16
    assert config.routing.max_inflight_requests == 64


def test_configuration_is_frozen() -> None:
    config = local_config()
    with pytest.raises(ValidationError, match="frozen"):
        config.engine.block_size = 32
    with pytest.raises(ValidationError, match="frozen"):
        config.mode = "monolithic"


def test_unknown_top_level_key_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"colour: Extra inputs"):
        parse_config(local_document() | {"colour": "red"})


@pytest.mark.parametrize("section", SECTIONS)
def test_unknown_key_in_a_section_is_refused_by_name(section: str) -> None:
    document = local_document()
    document[section] = {**document.get(section, {}), "colour": "red"}
    with pytest.raises(ConfigError, match=rf"{section}\.colour: Extra inputs"):
        parse_config(document)


@pytest.mark.parametrize("section", ["model", "prefill", "decode", "trust"])
def test_missing_section_without_defaults_is_named(section: str) -> None:
    document = local_document()
    del document[section]
    with pytest.raises(ConfigError, match=rf"{section}: Field required"):
        parse_config(document)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("mode", "sideways"),
        ("model.name", ""),
        ("model.served_name", ""),
        ("model.dtype", "int8"),
        ("model.max_model_len", 15),
        ("engine.backend", "abacus"),
        ("engine.block_size", 0),
        ("engine.block_size", 257),
        ("engine.max_num_batched_tokens", 0),
        ("engine.max_num_seqs", 0),
        ("engine.max_prefill_chunk", 0),
        ("engine.max_waiting", 0),
        ("engine.case_idle_ttl_s", 0),
        ("prefill.replicas", 0),
        ("prefill.replicas", 1001),
        ("prefill.num_blocks", 7),
        ("decode.num_threads", 0),
        ("decode.device", "tpu"),
        ("decode.device", "cuda:x"),
        ("decode.num_cpus", -0.5),
        ("decode.num_gpus", -1),
        ("decode.max_ongoing_requests", 0),
        ("transfer.mode", "pull"),
        ("transfer.ticket_ttl_s", 0),
        ("transfer.write_timeout_s", -1),
        ("transfer.handoff_timeout_s", 0),
        ("transfer.fence_timeout_s", 0),
        ("routing.local_prefill_max_tokens", -1),
        ("routing.max_inflight_requests", 0),
        ("routing.choose_timeout_s", 0),
        ("routing.reserve_timeout_s", 0),
        ("routing.request_timeout_s", 0),
        ("routing.affinity_max_imbalance", -1),
        ("ingress.port", 0),
        ("ingress.port", 65536),
        ("ingress.replicas", 0),
        ("ingress.max_body_bytes", 1023),
        ("ingress.max_ongoing_requests", 0),
        ("trust.policy_reload_s", 0),
        ("trust.audit.on_failure", "ignore"),
        ("trust.audit.max_queue", 0),
        ("trust.audit.fsync_records", 0),
        ("trust.audit.fsync_ms", -1),
        ("trust.audit.rotate_bytes", 100),
        ("trust.audit.probe_s", 0),
        ("claims.plan", "Not A Plan"),
        ("claims.plan", "../other"),
        ("claims.max_tokens", 15),
    ],
)
def test_value_out_of_range_is_refused_with_its_key(path: str, value: object) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_config(with_value(path, value), source="some.yaml")
    assert str(refusal.value).startswith(f"some.yaml: {path}: ")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("prefill.replicas", "3"),
        ("prefill.replicas", True),
        ("prefill.replicas", 1.5),
        ("ingress.port", True),
        ("ingress.host", 127),
        ("trust.create_missing", "yes"),
        ("trust.keys_file", 5),
        ("trust.keys_file", None),
        ("trust.manifests_dir", 5),
        ("trust.audit.dir", None),
        ("model.served_name", 7),
        ("decode.labels", {"role": 1}),
        ("decode.cpus", [True]),
        ("decode.cpus", ["0"]),
        ("decode.cpus", [-1]),
        ("decode.cpus", 0),
        ("decode.cpus", "01"),
        ("engine", None),
        ("engine", []),
        ("prefill.num_cpus", float("nan")),
        ("routing.request_timeout_s", float("inf")),
    ],
)
def test_value_of_another_type_is_not_converted(path: str, value: object) -> None:
    with pytest.raises(ConfigError, match=path.replace(".", r"\.")):
        parse_config(with_value(path, value))


def test_whole_number_is_taken_where_seconds_or_cpus_are_asked_for() -> None:
    assert parse_config(with_value("prefill.num_cpus", 1)).prefill.num_cpus == 1.0


@pytest.mark.parametrize("pool", ["prefill", "decode"])
def test_pool_that_cannot_hold_one_longest_request_is_refused(pool: str) -> None:
    document = with_value(f"{pool}.num_blocks", 511)  # 511 x 16 < 8192
    fault = rf"{pool}\.num_blocks holds 8176 tokens, fewer than model\.max_model_len 8192"
    with pytest.raises(ConfigError, match=fault):
        parse_config(document)
    document[pool]["num_blocks"] = 512
    assert getattr(parse_config(document), pool).num_blocks == 512


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"cpus": [1, 1]}, "cpus names a core twice"),
        ({"cpus": [1], "replicas": 2}, "cpus would put all 2 replicas on the same cores"),
        ({"cpus": [1], "num_threads": 2}, "num_threads: 2 threads would share the 1 cores of cpus"),
    ],
)
def test_cores_that_one_replica_would_not_have_to_itself_are_refused(changes: dict[str, object], fault: str) -> None:
    document = local_document()
    document["decode"] |= changes
    with pytest.raises(ConfigError, match=f"decode: {fault}"):
        parse_config(document)


def test_pools_are_not_pinned_unless_the_file_says_so() -> None:
    document = local_document()
    for pool in ("prefill", "decode"):
        del document[pool]["cpus"]
    config = parse_config(document)
    assert (config.prefill.cpus, config.decode.cpus) == ((), ())


def test_shipped_configurations_are_found_by_name_unless_a_file_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(Path("local-monolithic")) == BUNDLED / "local-monolithic.yaml"
    for other in (Path("local.yaml"), Path("sub/local"), tmp_path / "local"):
        assert find_config(other) == other
    (tmp_path / "local").touch()
    assert find_config(Path("local")) == Path("local")


def test_an_unknown_name_of_a_configuration_is_answered_with_those_that_are_shipped() -> None:
    assert shipped_names() == ["local", "local-monolithic"]
    with pytest.raises(ConfigError, match=r"^nope: neither a file nor .* local, local-monolithic$"):
        find_config(Path("nope"))


def test_the_two_local_modes_have_the_same_engine_and_the_same_cores_and_blocks_in_all() -> None:
    apart, one = (load_config(BUNDLED / f"{name}.yaml") for name in ("local", "local-monolithic"))
    assert (apart.mode, one.mode) == ("disaggregated", "monolithic")
    assert (apart.model, apart.engine, apart.claims) == (one.model, one.engine, one.claims)
    assert apart.prefill.cpus + apart.decode.cpus == one.decode.cpus
    assert apart.prefill.num_threads + apart.decode.num_threads == one.decode.num_threads
    assert apart.prefill.num_blocks + apart.decode.num_blocks == one.decode.num_blocks


def test_every_fault_is_named_at_once() -> None:
    document = with_value("ingress.port", 0)
    document["claims"]["max_tokens"] = 1
    with pytest.raises(ConfigError, match=r"ingress\.port.*claims\.max_tokens"):
        parse_config(document)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "the top level must be a mapping"),
        ("- a\n- b\n", "the top level must be a mapping"),
        ("just words\n", "the top level must be a mapping"),
        ("a: [1, 2\n", "not YAML"),
        ("a: *nowhere\n", "not YAML"),
        ("a: !!python/object/apply:os.getcwd []\n", "not YAML"),
        ("a: 2024-13-45\n", "not YAML"),
        ("a: " + "[" * 700, "not YAML"),
        ("a: " + "1" * 5000, "not YAML"),
        ("1: 2\n", "1: Keys should be strings"),
    ],
)
def test_text_that_is_no_configuration_is_refused_in_one_sentence(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as refusal:
        load_config(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert fault in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"model: \xff\xfe\n")
    with pytest.raises(ConfigError, match="not YAML"):
        load_config(path)


def test_missing_file_and_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)


def test_file_larger_than_the_limit_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_text("#" * (MAX_CONFIG_BYTES + 1), encoding="utf-8")
    with pytest.raises(ConfigError, match="larger than"):
        load_config(path)


def test_written_and_read_again_it_is_the_same(tmp_path: Path) -> None:
    config = local_config(prefill={"labels": {"zoneserve.io/role": "prefill"}}, ingress={"port": 9001})
    document = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(write_yaml(tmp_path / "again.yaml", document)) == config
    assert config != local_config()


def test_parsing_leaves_the_document_alone() -> None:
    document = local_document()
    before = copy.deepcopy(document)
    parse_config(document)
    assert document == before


JWT = {"jwks_file": "keys/jwks.json", "issuer": "https://id.example", "audience": "zoneserve"}


def with_trust(**changes: object) -> dict[str, Any]:
    document = local_document()
    document["trust"] |= changes
    return document


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"manifests_dir": None}, "trust: manifests_dir and manifest_keys_file go together"),
        ({"manifest_keys_file": None}, "trust: manifests_dir and manifest_keys_file go together"),
        (
            {"jwt": JWT | {"jwks_url": "https://id.example/keys"}},
            r"trust\.jwt: give exactly one of jwks_file and jwks_url",
        ),
        ({"jwt": JWT | {"jwks_file": None}}, r"trust\.jwt: give exactly one of jwks_file and jwks_url"),
        ({"jwt": JWT | {"jwks_file": None, "jwks_url": "http://id.example/keys"}}, r"trust\.jwt\.jwks_url: "),
        ({"jwt": JWT | {"audience": ""}}, r"trust\.jwt\.audience: "),
        ({"jwt": JWT | {"colour": "red"}}, r"trust\.jwt\.colour: Extra inputs"),
        ({"audit": {"dir": "logs", "colour": "red"}}, r"trust\.audit\.colour: Extra inputs"),
    ],
)
def test_trust_that_does_not_fit_together_is_refused(changes: dict[str, object], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        parse_config(with_trust(**changes))


def test_trust_needs_no_more_than_keys() -> None:
    document = local_document()
    document["trust"] = {"keys_file": "keys.yaml", "master_key_file": "master.key"}
    trust = parse_config(document).trust
    assert (trust.jwt, trust.policy_file, trust.manifests_dir, trust.manifest_keys_file, trust.audit) == (None,) * 5


def test_audit_limits_are_those_of_the_log_unless_the_file_says_otherwise() -> None:
    audit = parse_config(with_trust(audit={"dir": "logs", "on_failure": "continue", "fsync_ms": 50})).trust.audit
    assert audit is not None
    assert audit.options() == AuditOptions(on_failure="continue", fsync_ms=50)


def test_every_path_of_trust_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trust = parse_config(with_trust(jwt=JWT, policy_file="policy.yaml")).trust.absolute()
    assert trust.policy_file == tmp_path / "policy.yaml"
    assert trust.jwt is not None
    assert trust.jwt.jwks_file == tmp_path / "keys" / "jwks.json"
    assert trust.audit is not None
    paths = [trust.keys_file, trust.master_key_file, trust.manifests_dir, trust.manifest_keys_file, trust.audit.dir]
    assert all(path is not None and path.is_relative_to(tmp_path) for path in paths)
    assert not [text for text in trust.model_dump_json().split('"') if text.startswith(("out/", "keys/", "policy."))]
