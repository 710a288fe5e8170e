"""What arithmetic a device is found to have, and that everything goes by it.

A newer processor behaves like one with AVX2 only under the two variables of `AVX2`: the tests that
need such a machine run in processes of their own, and hold on any machine.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scd.training.optimizer import Muon, orthogonalize
from scd.utils import precision
from scd.utils.precision import precision_for, resolve_precision

CPU, BF16 = torch.device("cpu"), torch.bfloat16
ROOT = Path(__file__).parent.parent
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "CUDA_VISIBLE_DEVICES": "",
}


def under_avx2(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code as on a processor with AVX2 only, and no GPU."""
    environment = {**os.environ, **AVX2, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture
def emulating(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that only emulates bf16, whatever this one has."""
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: False)
    precision._warn_of_emulation.cache_clear()


def test_auto_is_what_the_device_has(emulating: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert resolve_precision("auto", CPU) == "fp32"
    assert resolve_precision("fp32", CPU) == "fp32"
    assert capsys.readouterr().err == ""
    # By name it is obeyed, with one line.
    assert [resolve_precision("bf16", CPU) for _ in range(3)] == ["bf16"] * 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "emulates" in said and "auto" in said


def test_fast_bf16_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: True)
    assert resolve_precision("auto", CPU) == "bf16"


def test_weights_in_bf16_are_widened_by_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: True)
    narrow, wide = (SimpleNamespace(dtype=dtype, device=CPU) for dtype in (BF16, torch.float32))
    assert precision_for(narrow, "fp32") == "bf16"  # the default
    assert precision_for(narrow, "tf32") == "fp32"  # which is what a processor has of it
    assert precision_for(wide, "fp32") == "fp32" and precision_for(wide, "bf16") == "bf16"


def test_the_processor_is_asked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    find_out = precision._cpu_has_bf16.__wrapped__
    kernels = torch.backends.mkldnn.is_available()
    kernels = kernels and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for times, fast in (([2.0, 1.0], True), ([1.0, 20.0], False)):
        monkeypatch.setattr(precision, "_fastest_of_each", lambda *matrices, times=times: times)
        assert find_out() is (fast and kernels)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 is x86's")
def test_a_processor_without_bf16_computes_in_fp32() -> None:
    """Nothing multiplies in bf16 there: a training step, an encoded clip, a rollout, Muon."""
    done = under_avx2((ROOT / "tests/avx2_trial.py").read_text())
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["capability"] == "AVX2" and not found["has_bf16"]
    assert found["products"] > 100 and found["bf16_products"] == []


def test_muon_is_that_of_torch() -> None:
    """In bf16 to the bit; in float32, as near as bf16 allows."""
    torch.manual_seed(0)
    shapes = [(48, 16), (16, 16), (16, 64)]
    exact, rough, theirs = ([torch.nn.Parameter(torch.ones(s)) for s in shapes] for _ in range(3))
    settings = {"lr": 0.02, "weight_decay": 0.1}
    optimizers = [
        Muon([{"params": exact, "muon": [1] * 3}], torch.float32, **settings),
        Muon([{"params": rough, "muon": [1] * 3}], torch.bfloat16, **settings),
        torch.optim.Muon(theirs, **settings),
    ]
    for _ in range(3):
        for of_one_shape in zip(exact, rough, theirs, strict=True):
            gradient = torch.randn(of_one_shape[0].shape)
            for parameter in of_one_shape:
                parameter.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    for in_fp32, in_bf16, their in zip(exact, rough, theirs, strict=True):
        assert torch.equal(in_bf16, their)
        assert 0 < (in_fp32 - their).norm() < 0.02 * (their - 1).norm()


def test_orthogonal_in_float32() -> None:
    matrix = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))
    found = orthogonalize(matrix, torch.float32)
    assert found.dtype == torch.float32 and found.shape == matrix.shape
    # Newton-Schulz of these coefficients leaves singular values between 0.68 and 1.13.
    assert torch.linalg.svdvals(found).min() > 0.6 and torch.linalg.svdvals(found).max() < 1.2
