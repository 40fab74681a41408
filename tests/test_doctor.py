"""What a machine has for training is told line by line, with what to do where something is missing."""

from __future__ import annotations

import pytest

from scalepeft import doctor


@pytest.fixture(scope="module")
def found():
    return {finding.what: finding for finding in doctor.findings()}


def test_a_machine_that_trains_is_told_so(found):
    import torch

    assert found["torch"].told == torch.__version__
    assert found["bitsandbytes"].well
    assert "runs forward and backward" in found["bitsandbytes"].told
    assert found["DeepSpeed"].well


def test_what_is_missing_has_a_mend(found):
    assert all(finding.mend for finding in found.values() if not finding.well and finding.what not in ("Hub", "bf16"))


def test_an_offline_machine_is_told_what_is_left(found):
    assert not found["Hub"].well
    assert "HF_HUB_OFFLINE" in found["Hub"].told


@pytest.mark.parametrize("address", ["http://a:b", "http://[::1", "huggingface.co"])
def test_an_address_that_is_none_is_a_line(address, command, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", address)
    told = doctor._hub()
    assert not told.well
    assert told.told == f"HF_ENDPOINT is {address!r}: it is no address; it takes one like https://huggingface.co"
    if address != "huggingface.co":  # which nothing fails to import with
        done = command("doctor")
        assert (done.returncode, done.stderr) == (0, "")
        assert told.told in done.stdout


def test_no_token_is_shown(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_mine")
    told = doctor._token()
    assert told.well
    assert "secret" not in told.told + told.mend


def test_a_compiler_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor.sys, "executable", str(tmp_path / "python"))
    told = doctor._compiler()
    assert not told.well
    assert told.told == "without a C++ compiler and ninja"
