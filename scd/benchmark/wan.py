"""Time causal Wans: dense beside separable, frame by frame in turn; and streams of their pictures.

Weights, texts and latents are random, since speed does not depend on them. Arithmetic is in the
type that `rollout.precision=auto` takes on the device. Texts are there as embeddings.
"""

import statistics
import time
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from scd.benchmark.cases import WanCase, WanStreamCase
from scd.benchmark.machine import Machine, measure_machine, peak_bytes, seconds, synchronize
from scd.benchmark.rollouts import fill_cache
from scd.models.world_model import CausalWorldModel
from scd.options import RolloutOptions
from scd.rollout import Rollout
from scd.training.step_cost import frame_flops
from scd.training.wan_dry_run import count_parameters
from scd.utils.precision import DTYPES, resolve_precision, with_weights_in
from scd.utils.table import Table
from scd.wan import CausalWan, SCDWan, SCDWanPipeline
from scd.wan.scd_wan import tensors_of_wan
from scd.wan.video_decoder import VideoDecoder

DENSE = "dense"
DOWNSAMPLING = 8  # of Wan's autoencoder
Network = TypeVar("Network", bound=nn.Module)


def run_wan(case: WanCase, device: torch.device) -> dict[str, Any]:
    """Time a frame of every model at every number of steps, in turn, in this process."""
    precision = resolve_precision("auto", device)
    machine = measure_machine(DTYPES[precision], device)
    torch.manual_seed(0)
    models = sharing_models(case, precision, device)
    rollouts = {}
    for name, model in models.items():
        of_steps = [steady_rollout(case, model, steps, precision) for steps in case.steps]
        for steps, rollout in zip(case.steps, of_steps, strict=True):
            rollout.cache = of_steps[0].cache  # noise all the same: memory for one is enough
            rollouts[name, steps] = rollout
    for name in models:  # as warmup, the fewest steps are enough
        frame_seconds(rollouts[name, min(case.steps)], device)
    times: dict[tuple[str, int], list[tuple[float, float]]] = {key: [] for key in rollouts}
    for _ in range(case.frames):
        for key, rollout in rollouts.items():
            times[key].append(frame_seconds(rollout, device))
    flops = {name: flops_of_frame(case, name) for name in models}
    return {
        "precision": precision,
        "rows": [
            {
                "model": name,
                "steps": steps,
                "parameters": count_parameters(models[name]),
                "once_seconds": [once for once, _ in times[name, steps]],
                "frame_seconds": [whole for _, whole in times[name, steps]],
                "flops": flops[name][steps],
            }
            for name, steps in rollouts
        ],
        "peak_bytes": peak_bytes(device),
        "machine": asdict(machine),
    }


def run_wan_stream(case: WanStreamCase, device: torch.device) -> dict[str, Any]:
    """Time streams of a model's pictures, from the text alone, in this process."""
    precision = resolve_precision("auto", device)
    torch.manual_seed(0)
    (name,) = case.models
    with torch.device("meta"):
        vae = with_weights_in(AutoencoderKLWan(**case.vae), precision)
    model = filled_at_random(empty_model(case, name, precision), device)
    pipeline = SCDWanPipeline(model, filled_at_random(vae, device))
    flops, rows = flops_of_frame(case, name), []
    for steps in case.steps:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        given = {
            **asdict(_settings(case, steps, precision)),
            "compile": case.compile,
            "height": case.height,
            "width": case.width,
            "prompt_embeds": random_text(case, device),
        }
        starts = seconds(lambda: next(pipeline.stream(**given)), case.starts, device)  # noqa: B023
        stream = pipeline.stream(**given)
        for _ in range(case.past + 1):
            next(stream)
        frames = seconds(lambda: next(stream), case.frames, device)  # noqa: B023
        rows.append(
            {
                "steps": steps,
                "first_seconds": starts,
                "frame_seconds": frames,
                "peak_bytes": peak_bytes(device),
                "flops": flops[steps],
            }
        )
    decoder = VideoDecoder(pipeline.vae, precision)
    latent = torch.randn(1, *latent_shape(case), device=device)
    decoder.decode(latent)  # the first is of one picture
    return {
        "precision": precision,
        "model": name,
        "parameters": count_parameters(model),
        "pictures": decoder.decode(latent).shape[1],
        "rows": rows,
        "decode_seconds": seconds(lambda: decoder.decode(latent), case.frames, device),
    }


def empty_model(case: WanCase, name: str, precision: str) -> CausalWan | SCDWan:
    """Build a case's model of this name without memory for its weights."""
    shared: dict[str, Any] = {
        "num_attention_heads": case.heads,
        "attention_head_dim": case.head_dim,
        "ffn_dim": case.ffn_dim,
        "text_dim": case.text_dim,
    }
    with torch.device("meta"):
        if name == DENSE:
            return with_weights_in(CausalWan(num_layers=case.layers, **shared), precision)
        encoder_frame, fusion = name.split(", ")
        split = SCDWan(
            encoder_layers=case.encoder_layers,
            decoder_first=case.decoder_first,
            decoder_last=case.decoder_last,
            encoder_frame=encoder_frame,
            fusion=fusion,
            first_frame=True,
            **shared,
        )
        return with_weights_in(split, precision)


@torch.no_grad()
def filled_at_random(model: Network, device: torch.device) -> Network:
    """Give a model that has no memory weights in place, without a copy of any.

    Norms are ones and biases zeros; other weights keep activations at about one.
    """
    model.to_empty(device=device)
    for name, tensor in model.named_parameters():
        if tensor.ndim == 1 or name.endswith("gamma"):
            tensor.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            bound = (3 * len(tensor) / tensor.numel()) ** 0.5
            tensor.uniform_(-bound, bound)
    return model.eval()


def sharing_models(
    case: WanCase, precision: str, device: torch.device
) -> dict[str, CausalWan | SCDWan]:
    """Build all models of a case, each of the dense one's tensors: several times 7 GB were many."""
    dense = filled_at_random(empty_model(case, DENSE, precision), device)
    weights, models = dense.state_dict(), {}
    for name in case.models:
        model = dense if name == DENSE else empty_model(case, name, precision).eval()
        if isinstance(model, SCDWan):
            tensors = tensors_of_wan(model, weights, case.layers)
            model.load_state_dict(tensors, assign=True)
        models[name] = model
    return models


def steady_rollout(case: WanCase, model: CausalWorldModel, steps: int, precision: str) -> Rollout:
    """Begin a rollout whose window is full, of noise."""
    rollout = Rollout(model, _settings(case, steps, precision))
    context = torch.randn(1, 1, *latent_shape(case), device=model.device)
    rollout.reset(context, text=random_text(case, model.device))
    fill_cache(rollout, 2 * rollout.window.frames)
    return rollout


def _settings(case: WanCase, steps: int, precision: str) -> RolloutOptions:
    return RolloutOptions(
        steps,
        "consistency",
        "even",
        shift=5.0,
        guidance="none",
        guidance_scale=1.0,
        window=case.past,
        precision=precision,  # type: ignore[arg-type]
    )


def latent_shape(case: WanCase) -> tuple[int, int, int]:
    return 16, case.height // DOWNSAMPLING, case.width // DOWNSAMPLING


def random_text(case: WanCase, device: torch.device) -> Tensor:
    return torch.randn(1, case.text_length, case.text_dim, device=device)


def frame_seconds(rollout: Rollout, device: torch.device) -> tuple[float, float]:
    """Time the next frame: what comes before the first denoising step, and the whole."""
    marks = []

    def mark() -> None:
        synchronize(device)
        marks.append(time.perf_counter())

    rollout.on_encoded = mark
    mark()
    rollout.step()
    mark()
    return marks[1] - marks[0], marks[2] - marks[0]


def flops_of_frame(case: WanCase, name: str) -> dict[int, int]:
    """Count the operations of a frame behind `case.past` others, by its number of steps."""
    model = empty_model(case, name, "fp32")
    once, each = frame_flops(model, latent_shape(case), case.past, case.text_length)
    return {steps: once + steps * each for steps in case.steps}


def wan_tables(results: list[tuple[WanCase, dict[str, Any]]]) -> list[Table]:
    """Tabulate the results: a table for each case in turns, and one for all streams."""
    streams = [(case, r) for case, r in results if isinstance(case, WanStreamCase)]
    turns = [(case, r) for case, r in results if not isinstance(case, WanStreamCase)]
    tables = [_table_of_turns(case, r) for case, r in turns]
    return [*tables, _table_of_streams(streams)] if streams else tables


def _table_of_turns(case: WanCase, r: dict[str, Any]) -> Table:
    heads = [f"{case.name}, {r['precision']}", "steps", "s/latent p50", "slowest", "of it once"]
    heads += ["TFLOP", "floor, s", "of the floor", "dense ÷ it", "by arithmetic"]
    dense = {row["steps"]: row for row in r["rows"] if row["model"] == DENSE}
    machine, lines = Machine(**r["machine"]), []
    for row in r["rows"]:
        taken = statistics.median(row["frame_seconds"])
        floor = row["flops"] / machine.best_flops
        other = dense.get(row["steps"])
        ratios = ["–", "–"]
        if other is not None:
            ratios = [
                f"{statistics.median(other['frame_seconds']) / taken:.2f}",
                f"{other['flops'] / row['flops']:.2f}",
            ]
        lines.append(
            [
                f"{row['model']} ({row['parameters'] / 1e9:.2f} B)",
                str(row["steps"]),
                f"{taken:.3f}",
                f"{max(row['frame_seconds']):.3f}",
                f"{statistics.median(row['once_seconds']):.3f}",
                f"{row['flops'] / 1e12:.3g}",
                f"{floor:.3f}",
                f"{taken / floor:.2f}",
                *ratios,
            ]
        )
    notes = [
        "A latent is four pictures. Once: before the first denoising step, the encoder's pass, or "
        "the dense model's over the finished frame. `noise` encodes the newest frame and, as "
        "noise, the next: in one pass the operations of two. Floor: the operations at "
        f"{machine.best_flops / 1e9:.0f} GFLOP/s, the rate of large matrix products. All models "
        f"share one set of weights; peak {r['peak_bytes'] / 1e9:.1f} GB.",
    ]
    return Table(heads, lines, 1, notes)


def _table_of_streams(streams: list[tuple[WanStreamCase, dict[str, Any]]]) -> Table:
    heads = ["streamed with decoding", "steps", "first picture, s", "s/latent p50", "p95"]
    heads += ["of it decoding", "pictures/s", "TFLOP", "peak, GB"]
    lines = []
    for case, r in streams:
        decoding = statistics.median(r["decode_seconds"])
        for row in r["rows"]:
            frame, slow = np.quantile(row["frame_seconds"], [0.5, 0.95])
            lines.append(
                [
                    f"{case.name}, {r['precision']}",
                    str(row["steps"]),
                    f"{statistics.median(row['first_seconds']):.3f}",
                    f"{frame:.3f}",
                    f"{slow:.3f}",
                    f"{decoding:.3f}",
                    f"{r['pictures'] / frame:.1f}",
                    f"{row['flops'] / 1e12:.3g}",
                    f"{row['peak_bytes'] / 1e9:.1f}",
                ]
            )
    notes = [
        "First picture: from the embedded text on, after a stream as warmup; the text encoder is "
        "not part of it, but, compiled, the capture of the graph is. TFLOP: of a latent, without "
        "decoding.",
    ]
    return Table(heads, lines, 1, notes)
