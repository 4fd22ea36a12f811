"""What `tpfuse info` tells where nvidia-smi is of no use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpfuse import info


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("#!/bin/sh\nexec sleep 60\n", "did not answer within 0.2 s"),
        ("not a program\n", "can't be run: Exec format error"),
        ("#!/bin/sh\necho no driver\necho at all\nexit 9\n", "ended with code 9: no driver"),
        ("#!/bin/sh\nexit 9\n", "ended with code 9"),
    ],
    ids=["hangs", "no program", "fails", "fails silently"],
)
def test_an_nvidia_smi_that_is_of_no_use_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, why: str
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(script, encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(info, "SMI_SECONDS", 0.2)
    assert info.collect().versions["driver"] == f"not available ({tool} {why})"
    assert info._kinds() == {}


def test_without_nvidia_smi_no_driver_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "driver" not in info.collect().versions
