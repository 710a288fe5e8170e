"""Work out what a training step costs, and measure how fast steps run.

Costs are counted on tensors that have no memory: tokens, FLOPs, bytes. With them, a run logs tokens
per second, TFLOP/s and MFU, beside its peak memory and traces of torch's profiler.
"""

import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from scd.models.world_model import FirstLook, WorldModel
from scd.options import Options
from scd.training.build import AnyCodec, build_network, latent_shape
from scd.utils.files import write_atomically
from scd.utils.precision import DTYPES, resolve_precision


@dataclass
class StepEstimate:
    """The costs of a training step of one process, on `train.batch_size` clips."""

    parameters: dict[str, int]  # by part of the model
    tokens: int  # of the clips, each counted once
    flops: int  # forward and backward, matrix products and attention only
    state_bytes: int  # weights, gradients, Adam's moments and averages, in float32
    activation_bytes: int  # kept for the backward pass

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())


def estimate_step(options: Options, codec: AnyCodec, counts_scores: bool = True) -> StepEstimate:
    """Run one forward and backward pass at the options' true shapes, and count what it costs.

    Args:
        counts_scores: False: attention's scores of many queries by many keys do not count as kept,
            as with the kernels of GPUs.
    """
    with torch.device("meta"):
        model = build_network(options, codec)
    model.set_gradient_checkpointing(options.train.gradient_checkpointing)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(options.train.mixed_precision, device)
    # Not diffusers' own `to`, whose warning does not matter here.
    nn.Module.to(model, DTYPES[precision])
    kept: dict[int, int] = {}  # storage -> bytes; a tensor is saved once for all that need it
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}

    widths = {size for p in model.parameters() for size in p.shape}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        many = tensor.ndim > 2 and min(tensor.shape[-2:]) > model.head_dim
        scores = many and tensor.shape[-1] not in widths  # queries by keys
        if storage._cdata not in parameters and (counts_scores or not scores):
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(**_inputs(model, options, codec)).square().mean()
        loss.backward()
    sizes = {
        name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()
    }
    total = sum(p.numel() for p in model.parameters())
    averages = len(options.optim.ema_sigma_rel) if options.train.snapshot_every else 0
    _, height, width = latent_shape(codec, options)
    frames = options.train.batch_size * options.data.frames
    return StepEstimate(
        parameters={name: size for name, size in sizes.items() if size},
        tokens=frames * model.tokens_per_frame(height, width),
        flops=counter.get_total_flops(),
        state_bytes=total * 4 * (5 + averages),
        activation_bytes=sum(kept.values()),
    )


class ClipCost(NamedTuple):
    """The cost of one clip in a training step."""

    tokens: int  # each counted once, however often it is noised
    flops: int  # as in `StepEstimate`, without what gradient checkpointing computes a second time


def clip_cost(options: Options, codec: AnyCodec) -> ClipCost:
    """Count the tokens and FLOPs of the model itself, which MFU is based on.

    Attention counts the keys that a query may see. A frozen autoencoder and a history of the
    model's own frames (`flow.self_forcing_prob`) are left out.

    Only models of one and two layers are counted, since every further layer costs as much as the
    second: all twelve of the dense baseline, on 300 frames, would delay a run's start by a minute.
    """
    train = replace(options.train, batch_size=1, gradient_checkpointing=False)
    names = ("encoder_layers", "decoder_layers", "layers")
    depths = {name: depth for name in names if (depth := getattr(options.model, name))}

    def count(**layers: int) -> StepEstimate:
        shallow: dict[str, Any] = {**dict.fromkeys(depths, 1), **layers}
        model = replace(options.model, **shallow)
        wan = replace(options.wan, decoder_first=0)  # one layer costs as much as another
        return estimate_step(replace(options, model=model, wan=wan, train=train), codec)

    one = count()
    further = {name: count(**{name: 2}).flops - one.flops for name in depths if depths[name] > 1}
    flops = one.flops + sum((depths[name] - 1) * more for name, more in further.items())
    return ClipCost(one.tokens, flops)


def _inputs(model: WorldModel, options: Options, codec: AnyCodec) -> dict[str, Any]:
    b, f, k = options.train.batch_size, options.data.frames, options.flow.noise_draws
    shape = latent_shape(codec, options)
    predicted = f - model.first_predicted
    with torch.device("meta"):
        latents = torch.empty(b, f, *shape)
        noisy = torch.empty(b, k, predicted, *shape)
        timesteps = torch.empty(b, k, predicted)
        conditions = model.null_conditions((b, f))
        tokens = model.tokens_per_frame(*shape[1:])
        text = torch.empty(b, options.wan.text_length, options.wan.text_dim)
        perturbation = torch.empty(b, predicted, tokens, model.width, dtype=model.dtype)
    return {
        "latents": latents,
        "noisy": noisy,
        "timesteps": timesteps,
        "conditions": conditions if options.model.condition != "none" else None,
        "perturbation": perturbation if model.has_context else None,
        "first_look": FirstLook(noisy[:, 0], timesteps[:, 0]) if model.takes_first_look else None,
        "text": text if model.has_text else None,
    }


# TFLOP/s of dense matrix products in bf16, and of float32 ones as TF32, by CUDA's name of the
# device: from NVIDIA's data sheets, halved where they count sparsity. Laptop cards and slices of a
# card (MIG) have other peaks.
PEAK_TFLOPS = {
    r"A100(-SXM4-\d+GB|-PCIE-\d+GB| 80GB PCIe)": (312, 156),
    r"H100 80GB HBM3": (989, 495),
    r"H100 PCIe": (756, 378),
    r"H100 NVL": (835, 418),
    r"H200": (989, 495),
    r"B200": (2250, 1125),
    r"L40S": (362, 183),
    r"GeForce RTX 4090": (165, 83),
}


class ThroughputMeter:
    """Throughput of the steps since the last report; the time between steps does not count.

    Args:
        clips: per step, over all processes.
        processes: the number of processes that share them.
        cost: of one clip; None: unknown.
        peak: peak FLOP/s of one process's device; None: unknown.
    """

    def __init__(self, clips: int, processes: int, cost: ClipCost | None, peak: float | None):
        self.clips = clips
        self.processes = processes
        self.cost = cost
        self.peak = peak
        self._reset()

    def _reset(self) -> None:
        self.steps = 0
        self.seconds = 0.0
        self.waited = 0.0

    def time_waiting(self, batches: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Pass batches on, and measure how long each is waited for."""
        began = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - began
            yield batch
            began = time.perf_counter()

    def add_step(self, seconds: float) -> None:
        self.steps += 1
        self.seconds += seconds

    def report(self, device: torch.device) -> dict[str, float]:
        """Return means since the last report, and this process's peak memory so far.

        `seconds` per step; `clips_per_second` and `tokens_per_second` of all processes, each token
        of a clip counted once; `tflops` (TFLOP/s) of this process and `mfu`, its share of the
        device's peak; `data_wait`, the share of the time spent waiting for data; memory in GiB.
        Unknown values are left out.
        """
        clips_per_second = self.clips * self.steps / self.seconds
        values = {
            "seconds": self.seconds / self.steps,
            "clips_per_second": clips_per_second,
            "data_wait": self.waited / self.seconds,
            **_peak_memory(device),
        }
        if self.cost is not None:
            flops = self.cost.flops * clips_per_second / self.processes
            values["tokens_per_second"] = self.cost.tokens * clips_per_second
            values["tflops"] = flops / 1e12
            if self.peak is not None:
                values["mfu"] = flops / self.peak
        self._reset()
        return values


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Look up a device's peak FLOP/s in `bf16`, or in `fp32` as TF32; None: not in `PEAK_TFLOPS`.

    TF32 counts for float32 even where torch does not use it: the device could.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for pattern, (bf16, tf32) in PEAK_TFLOPS.items():
        if re.fullmatch(f"NVIDIA {pattern}", name):
            return 1e12 * (bf16 if precision == "bf16" else tf32)
    return None


def _peak_memory(device: torch.device) -> dict[str, float]:
    """Read peak memory in GiB; of a GPU, allocated by tensors and reserved by torch for them."""
    if device.type == "cuda":
        return {
            "memory_gib": torch.cuda.max_memory_allocated(device) / 2**30,
            "memory_reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
        }
    # Linux counts in KiB.
    return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


class ProfilerTrace:
    """A trace of chosen steps by torch's profiler: `traces/steps-<first>-<last>.json.gz`.

    A run that begins or ends among these steps writes none.

    Args:
        output: the run's folder.
        steps: the first and the last step; empty: none.
        enabled: on the main process.
    """

    def __init__(self, output: Path, steps: list[int], enabled: bool):
        self.first, self.last = steps or (0, 0)
        self.path = output / "traces" / f"steps-{self.first}-{self.last}.json.gz"
        self.enabled = enabled
        self.profiler: profile | None = None

    def close(self) -> None:
        """Drop a trace that is not finished."""
        if self.profiler is not None:
            self.profiler.stop()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Record the block as this step, if it is among the chosen ones."""
        if self.enabled and number == self.first:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self.profiler = profile(activities=activities, record_shapes=True)
            self.profiler.start()
        if self.profiler is None:
            yield
            return
        with record_function(f"training step {number}"):
            yield
        if number == self.last:
            recorded, self.profiler = self.profiler, None
            recorded.stop()
            write_atomically(self.path, lambda aside: recorded.export_chrome_trace(str(aside)))
            print(f"{self.path}: open it at https://ui.perfetto.dev")
