"""The configuration with which an instance joins a system that runs on another host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from hbserve.config import InstanceConfig, InstanceRole, from_dict
from hbserve.errors import ConfigError
from hbserve.messages.membership import Joined
from hbserve.worker.join_client import config_of

INSTANCE = InstanceConfig(instance_id="unified-9", instance_type=InstanceRole.UNIFIED, tensor_parallel_size=1)


def joined(path: str) -> Joined:
    """What a scheduler answers whose host has the model in this folder."""
    document: dict[str, Any] = msgspec.to_builtins(from_dict({"model": {"path": "smollm2"}}))
    return Joined(config={**document, "model": {**document["model"], "path": path}}, kv_rank=9)


def test_the_model_is_the_same_folder_or_is_fetched_by_its_name(tmp_path: Path) -> None:
    paths = {
        str(tmp_path): str(tmp_path),
        "/elsewhere/hub/models--org--tiny/snapshots/0a1b": "org/tiny@0a1b",
        "/elsewhere/hbserve/smollm2-135m-instruct-1": "smollm2",
    }
    for theirs, ours in paths.items():
        assert config_of(joined(theirs), INSTANCE, None, None).model.path == ours
    assert config_of(joined("/elsewhere/model"), INSTANCE, str(tmp_path), None).model.path == str(tmp_path)
    with pytest.raises(ConfigError, match=r"^--model: the system's model is '/elsewhere/model' on the scheduler's"):
        config_of(joined("/elsewhere/model"), INSTANCE, None, None)
