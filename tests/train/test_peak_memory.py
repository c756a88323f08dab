"""The peak of resident memory is that of the steps, not of what came before them."""

import numpy as np
import pytest

from qies.config import RunConfig
from qies.train import peak_memory
from qies.train.loop import train

pytestmark = pytest.mark.skipif(not peak_memory.CLEAR.exists(), reason="only Linux can start the peak anew")
MIB = 2**20


def touched(mebibytes: int) -> np.ndarray:
    return np.ones(mebibytes * MIB // 8)


def test_the_peak_starts_anew_and_then_holds():
    held = touched(300)
    before = peak_memory.peak()
    del held
    peak_memory.reset_peak()
    base = peak_memory.peak()
    assert before - base > 250 * MIB
    held = touched(200)
    del held
    assert 150 * MIB < peak_memory.peak() - base < 250 * MIB


def test_what_is_compiled_on_first_use_is_no_part_of_a_runs_peak(shards, data_config, tiny, tmp_path, monkeypatch):
    """A stand-in for the compiler, which takes memory before the first step and gives it back."""
    from qies.train import loop

    compile_ = loop._Run._compile

    def greedy(self):
        compile_(self)
        touched(600)

    monkeypatch.setattr(loop._Run, "_compile", greedy)
    peak_memory.reset_peak()
    base = peak_memory.peak()
    record = train(RunConfig("no_phase", "50k", 32 * 4 * 3, data=data_config, train=tiny), shards, tmp_path / "run")
    assert base / 2 < record.peak_memory_bytes < base + 500 * MIB
