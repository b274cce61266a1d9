"""What ends a start over ranks before one has loaded anything."""

from __future__ import annotations

import pickle
import signal
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch

from cascade_llm.config import EngineOptions
from cascade_llm.errors import ConfigError
from cascade_llm.models.architectures import model_config_from_hf
from cascade_llm.worker import rank_options
from cascade_llm.worker.rank_options import check_ranks
from cascade_llm.worker.rank_process import CLOSE, FAILED, RankSetup, run_rank
from tests.models.checkpoints import hf_config_of, tiny_model


def test_more_ranks_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_options, "resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = model_config_from_hf(hf_config_of(tiny_model("llama")))
    check_ranks(EngineOptions(device="cuda"), config)
    with pytest.raises(ConfigError, match="tensor_parallel_size is 2, and torch sees 1 CUDA devices: each rank takes"):
        check_ranks(EngineOptions(device="cuda", tensor_parallel_size=2), config)


def test_a_rank_of_another_version_says_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)  # of this process
    here, there = Pipe()
    options = EngineOptions(tensor_parallel_size=2)
    run_rank(there, RankSetup(model="none", options=options, index=0, count=2, meeting_point=Path(), version="0.0.1"))
    message = here.recv_bytes()
    here.send_bytes(CLOSE)
    assert message.startswith(FAILED)
    error = pickle.loads(message.removeprefix(FAILED)).error
    assert "the engine is cascade-llm 0.0.1, this rank runs" in str(error)
