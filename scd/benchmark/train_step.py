"""Time complete training steps: noise, forward, backward, gradient clipping, AdamW, EMA."""

from dataclasses import asdict
from itertools import count
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from scd.benchmark.cases import ACTIONS, CHANNELS, SIDE, TrainCase
from scd.benchmark.machine import measure_machine, peak_bytes, seconds
from scd.flow.objective import FlowObjective
from scd.models import SCD
from scd.options import FlowOptions
from scd.training.ema import EMA
from scd.utils.precision import autocast


def run_training(case: TrainCase, device: torch.device) -> dict[str, Any]:
    """Measure time, memory and operations of training steps in this process."""
    dtype = getattr(torch, case.dtype)
    machine = measure_machine(dtype, device)
    torch.manual_seed(0)
    model = SCD(
        channels=CHANNELS,
        heads=case.heads,
        encoder_layers=case.encoder_layers,
        decoder_layers=case.decoder_layers,
        condition="action",
        num_conditions=ACTIONS,
    ).to(device)
    objective = FlowObjective(model, FlowOptions(noise_draws=case.draws), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ema = EMA(model, 0.9999, None)
    steps = count(1)
    shape = (case.batch, case.frames)
    batch = {
        "sample": torch.arange(case.batch),
        "latents": torch.randn(*shape, CHANNELS, SIDE, SIDE, device=device),
        "actions": torch.randint(ACTIONS, shape, device=device),
    }

    def step() -> None:
        with autocast(device, "bf16" if dtype == torch.bfloat16 else "fp32"):
            loss = objective(batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(next(steps))

    times = seconds(step, case.steps, device)
    peak = peak_bytes(device)
    with FlopCounterMode(display=False) as counter:
        step()
    flops = counter.get_total_flops()
    return {
        "step_seconds": times,
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_bytes": peak,
        "flops": flops,
        "floor_seconds": flops / machine.best_flops,
        "machine": asdict(machine),
    }
