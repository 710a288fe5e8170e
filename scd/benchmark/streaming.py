"""Seconds a frame of a rollout, its first frame with prefill, and its memory.

Weights are random: speed does not depend on them. Each case runs in a process of its own, so that
its peak memory is its own.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from scd.benchmark.machine import matrix_rate, peak_bytes, synchronise
from scd.environment import environment
from scd.errors import ScdError
from scd.evaluation.table import Table
from scd.files import write_json
from scd.models import SCD, CausalDiT, WorldModel
from scd.options import RolloutOptions
from scd.rollout import Rollout

SIDE, CHANNELS, ACTIONS = 8, 32, 4  # latents of a frame: 8x8 of 32 channels, as Minecraft's


@dataclass(frozen=True)
class Case:
    """One rollout to time.

    Args:
        encoder_layers: 0: the dense baseline, of `decoder_layers` layers.
        frames: timed one by one, after a first one that includes the prefill and a second one
            that warms up.
    """

    name: str
    heads: int = 16
    encoder_layers: int = 8
    decoder_layers: int = 4
    context: int = 36
    steps: int = 10
    guidance: str = "context"
    scale: float = 1.5
    dtype: str = "float32"
    frames: int = 5


CASES = [
    Case("SCD-M, context 36, 10 steps, guidance 1.5, fp32"),
    Case("SCD-M, context 36, 10 steps, guidance 1.5, bf16", dtype="bfloat16"),
    Case("SCD-M, context 144, 10 steps, guidance 1.5, bf16", context=144, dtype="bfloat16"),
    Case("SCD-M, context 299, 10 steps, guidance 1.5, bf16", context=299, dtype="bfloat16"),
    Case(
        "SCD-M, context 144, 50 steps, bf16",
        context=144,
        steps=50,
        guidance="none",
        dtype="bfloat16",
        frames=3,
    ),
    Case(
        "Causal DiT-M, context 144, 50 steps, bf16",
        encoder_layers=0,
        decoder_layers=12,
        context=144,
        steps=50,
        guidance="none",
        dtype="bfloat16",
        frames=3,
    ),
]


def benchmark_streaming(out: Path, names: str | None = None) -> None:
    """Run the cases whose name contains `names`; print a table, write JSON.

    Raises:
        ScdError: no case has such a name, or one of them failed.
    """
    cases = [case for case in CASES if names is None or names in case.name]
    if not cases:
        raise ScdError(f"no case contains {names!r}; there are {'; '.join(c.name for c in CASES)}")
    results = []
    for case in cases:
        print(f"{case.name} ...", flush=True)
        results.append(_in_own_process(case))
    text = _table(results).markdown()
    write_json(out, {"cases": results, "environment": environment()})
    print(f"\n{text}\n\nfigures: {out}")


def run_case(case: Case) -> dict[str, Any]:
    """Time one case in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, case.dtype)
    rate = matrix_rate(dtype, device)
    model = build(case).to(device, dtype).eval()
    torch.manual_seed(0)
    context = torch.randn(1, case.context, CHANNELS, SIDE, SIDE, device=device)
    actions = torch.randint(ACTIONS, (1, case.context + case.frames + 2))
    settings = RolloutOptions(case.steps, guidance=case.guidance, guidance_scale=case.scale)
    rollout = Rollout(model, settings, case.context + case.frames + 2)
    times = []
    for number in range(case.frames + 2):
        synchronise(device)
        started = time.perf_counter()
        if number == 0:
            rollout.reset(context, actions[:, : case.context])
        rollout.step(actions[:, case.context + number])
        synchronise(device)
        times.append(time.perf_counter() - started)
    return {
        "case": asdict(case),
        "first_frame_seconds": times[0],
        "frame_seconds": times[2:],
        "matrix_rate": rate,
        "frame_flops": frame_flops(case),
        "peak_bytes": peak_bytes(device),
        "device": str(device),
    }


def build(case: Case) -> WorldModel:
    shared: dict[str, Any] = {"channels": CHANNELS, "heads": case.heads}
    shared |= {"condition": "action", "num_conditions": ACTIONS}
    torch.manual_seed(0)
    if case.encoder_layers:
        return SCD(encoder_layers=case.encoder_layers, decoder_layers=case.decoder_layers, **shared)
    return CausalDiT(layers=case.decoder_layers, **shared)


def frame_flops(case: Case) -> int:
    """Matrix products of one frame, without attention: what cannot be saved at these sizes."""
    width, tokens = 64 * case.heads, SIDE * SIDE
    layer = 2 * tokens * 12 * width**2  # of one frame's tokens
    branches = 1 if case.guidance == "none" else 2
    if not case.encoder_layers:
        return layer * case.decoder_layers * (branches * case.steps + 1)
    # [context ‖ noisy], and of the context half only keys and values in the last layer.
    decoder = layer * (2 * case.decoder_layers - 10 / 12)
    return round(layer * case.encoder_layers + branches * case.steps * decoder)


def _in_own_process(case: Case) -> dict[str, Any]:
    code = "import sys, json; from scd.benchmark import streaming as s; "
    code += "print(json.dumps(s.run_case(s.Case(**json.loads(sys.argv[1])))))"
    command = [sys.executable, "-c", code, json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise ScdError(f"{case.name}: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _table(results: list[dict[str, Any]]) -> Table:
    heads = ["case", "s/frame", "first frame, s", "floor, s", "of the floor", "GFLOP/s", "peak, GB"]
    lines = []
    for result in results:
        frame = statistics.median(result["frame_seconds"])
        floor = result["frame_flops"] / result["matrix_rate"]
        lines.append(
            [
                result["case"]["name"],
                f"{frame:.3f}",
                f"{result['first_frame_seconds']:.2f}",
                f"{floor:.3f}",
                f"{frame / floor:.2f}",
                f"{result['matrix_rate'] / 1e9:.0f}",
                f"{result['peak_bytes'] / 1e9:.2f}",
            ]
        )
    note = "Medians, batch 1; floor: the frame's matrix products at the rate of a large one."
    return Table(heads, lines, 1, [note])
