"""Peak memory is that of one phase, not of the process's life."""

from pathlib import Path

import pytest
import torch

from training import device_memory
from training.device_memory import PeakMemory

MIB = 2**20


def test_a_phase_is_not_charged_with_an_earlier_ones_memory() -> None:
    first = PeakMemory(torch.device("cpu"))
    if first.kind is None:
        pytest.skip(first.reason)
    torch.ones(64 * MIB // 4)
    peak = first.read()
    second = PeakMemory(torch.device("cpu")).read()
    assert peak is not None
    assert second is not None
    assert peak - second > 48 * MIB


def test_where_the_peak_cannot_be_reset_there_is_a_reason_and_no_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(device_memory, "STATUS", tmp_path / "absent")
    monkeypatch.setattr(device_memory, "CLEAR_REFS", tmp_path / "written")
    peak = PeakMemory(torch.device("cpu"))
    assert (peak.kind, peak.read()) == (None, None)
    assert "cannot be reset" in peak.reason


def test_a_device_without_a_counter_is_named() -> None:
    peak = PeakMemory(torch.device("meta"))
    assert (peak.read(), peak.reason) == (None, "no peak memory counter for device type meta")
