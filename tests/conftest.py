"""Fixtures that every suite may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.model_store import fetch
from engine.tokenizer import Tokenizer
from tests.conformance.greedy import NUM_OUTPUT_TOKENS, TransformersOracle, make_prompts
from tests.local_deployment import Deployment, start_deployment


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The SmolLM2-135M-Instruct GGUF; tests that use it carry the mark `model`."""
    return fetch("smollm2")


@pytest.fixture(scope="session")
def tokenizer(smollm2_path: Path) -> Tokenizer:
    """SmolLM2's."""
    return Tokenizer.from_path(smollm2_path)


@pytest.fixture(scope="session")
def greedy_prompts(tokenizer: Tokenizer) -> dict[str, tuple[int, ...]]:
    """Prompts of 1 to 3,000 tokens by name."""
    return {f"p{len(prompt)}": prompt for prompt in make_prompts(tokenizer)}


@pytest.fixture(scope="session")
def transformers_oracle(smollm2_path: Path) -> TransformersOracle:
    """The transformers model in float32 over the checkpoint's weights."""
    import torch

    torch.set_num_threads(2)
    return TransformersOracle(smollm2_path)


@pytest.fixture(scope="session")
def greedy_oracle(
    transformers_oracle: TransformersOracle, greedy_prompts: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """What transformers answers to `greedy_prompts`."""
    return {name: transformers_oracle.greedy(prompt, NUM_OUTPUT_TOKENS) for name, prompt in greedy_prompts.items()}


@pytest.fixture(scope="session")
def deployment(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """One real deployment for all tests that need one."""
    with start_deployment(smollm2_path, tmp_path_factory.mktemp("deployment")) as running:
        yield running


@pytest.fixture
def clean_deployment(deployment: Deployment) -> Iterator[Deployment]:
    """The deployment, with nothing left on it before and after the test."""
    deployment.wait_for_recovery()
    deployment.assert_clean(within_s=10.0)
    yield deployment
    deployment.wait_for_recovery()
    deployment.assert_clean(within_s=10.0)
