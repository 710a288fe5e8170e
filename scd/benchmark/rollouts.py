"""Time rollouts: prefill, first frame, further frames, and their decoding to pixels.

Weights are random, since speed does not depend on them.
"""

import time
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import psutil
import torch

from scd.benchmark.cases import ACTIONS, CHANNELS, SIDE, LongRolloutCase, RolloutCase
from scd.benchmark.machine import frame_floor, measure_machine, peak_bytes, seconds, synchronize
from scd.models import SCD, CausalDiT, WorldModel
from scd.models.autoencoder import LatentCodec, build_autoencoder
from scd.options import AutoencoderOptions, BlockType, RolloutOptions
from scd.rollout import Rollout

RES: BlockType = "ResBlock"
VIT: BlockType = "EfficientViTBlock"
# From 128x128 pixels to 8x8 latents, as for Minecraft.
AUTOENCODER = AutoencoderOptions(
    encoder_block_types=[RES, RES, RES, VIT, VIT],
    encoder_channels=[128, 256, 512, 512, 1024],
    encoder_layers=[0, 4, 8, 2, 2],
    decoder_block_types=[RES, RES, RES, VIT, VIT],
    decoder_channels=[128, 256, 512, 512, 1024],
    decoder_layers=[0, 5, 10, 2, 2],
    decoder_norm="batch_norm",
)


def run_rollout(case: RolloutCase, device: torch.device) -> dict[str, Any]:
    """Time the frames of one case in this process."""
    dtype = getattr(torch, case.dtype)
    machine = measure_machine(dtype, device)
    model = build(case).to(device, dtype).eval()
    torch.manual_seed(0)
    count = case.context + case.frames + 2
    settings = RolloutOptions(
        case.steps,
        guidance=case.guidance,
        compile=device.type == "cuda" and model.has_context,
        precision="bf16" if dtype == torch.bfloat16 else "fp32",
    )
    rollout = Rollout(model, settings, max(case.capacity, count))
    known = case.context if case.prefill else 1
    context = torch.randn(1, known, CHANNELS, SIDE, SIDE, device=device)
    actions = torch.randint(ACTIONS, (count, 1))
    times = []
    for number in range(case.frames + 2):
        synchronize(device)
        started = time.perf_counter()
        if number == 0:
            rollout.reset(context, actions[:known].T)
            if not case.prefill:
                fill_cache(rollout, case.context - 1)
            synchronize(device)
            prefill = time.perf_counter() - started
        rollout.step(actions[number])
        synchronize(device)
        times.append(time.perf_counter() - started)
    peak = peak_bytes(device)
    floor = frame_floor(case)
    return {
        "prefill_seconds": prefill if case.prefill else None,
        "first_frame_seconds": times[0] if case.prefill else None,
        "frame_seconds": times[2:],
        "decode_seconds": _decode_seconds(dtype, device),
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_bytes": peak,
        "flops": floor.flops,
        "bytes": floor.bytes,
        "floor_seconds": floor.seconds(machine),
        "machine": asdict(machine),
    }


def run_long_rollout(case: LongRolloutCase, device: torch.device) -> dict[str, Any]:
    """Measure time and memory of a long rollout, for each tenth of its frames."""
    model = SCD(channels=8, patch_size=2, heads=4, encoder_layers=4, decoder_layers=2)
    settings = RolloutOptions(4, guidance="none", window=case.window)
    rollout = Rollout(model.to(device).eval(), settings)
    rollout.reset(torch.randn(1, case.window, 8, SIDE, SIDE, device=device))
    marks, memory = [time.perf_counter()], []
    for number in range(case.frames):
        frame = rollout.step()
        if (number + 1) % (case.frames // 10) == 0:
            synchronize(device)
            marks.append(time.perf_counter())
            memory.append(_memory_now(device))
    assert torch.isfinite(frame).all()
    return {
        "frame_seconds": [(b - a) / (case.frames // 10) for a, b in pairwise(marks)],
        "bytes_after_each_tenth": memory,
        "peak_bytes": peak_bytes(device),
    }


def build(case: RolloutCase) -> WorldModel:
    """Build the case's model with random weights."""
    shared: dict[str, Any] = {"channels": CHANNELS, "heads": case.heads}
    shared |= {"condition": "action", "num_conditions": ACTIONS}
    torch.manual_seed(0)
    if case.encoder_layers:
        return SCD(encoder_layers=case.encoder_layers, decoder_layers=case.decoder_layers, **shared)
    return CausalDiT(layers=case.decoder_layers, **shared)


def fill_cache(rollout: Rollout, frames: int) -> None:
    """Fill the KV cache with noise, in place of a prefill of so many frames."""
    cache = rollout.cache
    cache.keys.normal_()
    cache.values.normal_()
    cache.frames = frames


@torch.no_grad()
def _decode_seconds(dtype: torch.dtype, device: torch.device) -> list[float]:
    """Time the decoding of single frames to pixels."""
    codec = LatentCodec(build_autoencoder(AUTOENCODER)).to(device, dtype).eval()
    latents = torch.randn(1, 1, CHANNELS, SIDE, SIDE, device=device).to(dtype)
    return seconds(lambda: codec.decode(latents), 5, device)


def _memory_now(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss
