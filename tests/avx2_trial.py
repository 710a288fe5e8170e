"""A short training, an encoded clip and a rollout, watching for products in bf16.

tests/test_precision.py runs this on a processor that has AVX2 only, or behaves so.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scd.data.lists import ClipEntry, write_list
from scd.options import load_options
from scd.pipeline import SCDPipeline
from scd.training.encode import encode_dataset
from scd.training.launch import run_experiment
from scd.utils.precision import has_bf16

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "convolution", "scaled_dot")
SMALL = ["model.heads=1", "model.encoder_layers=1", "model.decoder_layers=1", "data.frames=4"]
SMALL += ["train.steps=2", "train.batch_size=2", "train.workers=0", "flow.noise_draws=1"]


class Watch(TorchDispatchMode):
    """Count matrix products and convolutions, and name those with an operand in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.in_bf16: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(product in function.__name__ for product in PRODUCTS):
            self.products += 1
            operands = [arg for arg in args if isinstance(arg, torch.Tensor)]
            if any(operand.dtype == torch.bfloat16 for operand in operands):
                self.in_bf16.add(function.__name__)
        return function(*args, **(kwargs or {}))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for number in range(2):
            video = rng.integers(256, size=(16, 64, 64, 3), dtype=np.uint8)
            np.savez(f"{folder}/{number}.npz", video=video, actions=rng.integers(4, size=16))
        for name in ("train.json", "val.json"):
            entries = [ClipEntry(video_path=f"{number}.npz") for number in range(2)]
            write_list(Path(folder) / name, entries)
        where = [f"data.root={folder}", f"output_root={folder}"]
        options = load_options("options/scd_doom_tiny.yml", [*SMALL, *where])
        with Watch() as watch:
            encode_dataset(options)
            run_experiment(options)
            pipeline = SCDPipeline.from_pretrained(
                f"{folder}/scd_doom_tiny/exported", torch_dtype=torch.bfloat16
            )
            frames = pipeline(rng.random((1, 2, 64, 64, 3)), num_frames=2).frames
    print(
        json.dumps(
            {
                "capability": torch.backends.cpu.get_cpu_capability(),
                "has_bf16": has_bf16(torch.device("cpu")),
                "products": watch.products,
                "bf16_products": sorted(watch.in_bf16),
                "frames": list(frames.shape),
            }
        )
    )


main()
