from collections.abc import Callable
from pathlib import Path

import pytest
from engine_models import random_model
from helpers import byte_tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a variant's random model (see `engine_models`) in float32, in several shards."""
    saved: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in saved:
            saved[name] = tmp_path_factory.mktemp(name)
            random_model(name).save_pretrained(saved[name], max_shard_size="40KB")
            assert len(list(saved[name].glob("*.safetensors"))) > 1
        return saved[name]

    return directory


@pytest.fixture(scope="session")
def tokenizer():
    """One token per byte, so that every character beyond ASCII is split."""
    return byte_tokenizer()
