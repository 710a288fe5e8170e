"""A training step waits for its device at one point only.

Without a GPU: every way by which Python or an operator reads values of a tensor is watched on the
CPU, and told by the place that asked. On a GPU each such read waits until all work is done.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scd.data.loader import training_batches
from scd.options import load_options
from scd.training.launch import build_task, make_accelerator
from scd.training.trainer import Trainer
from tests.test_processes import OPTIONS

pytestmark = pytest.mark.usefixtures("fresh_accelerate", "one_thread")
ROOT = Path(__file__).parent.parent
READS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__")
DENSE = ["model.type=causal_dit", "model.layers=2", "model.encoder_layers=0"]
DENSE += ["model.decoder_layers=0"]
READING_OPERATORS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
)


class Operators(TorchDispatchMode):
    """Notes the operators whose result depends on values that the host has to know."""

    def __init__(self, note: Any):
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READING_OPERATORS:
            self.note()
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Within the block, every read adds the function of this project that asked for it."""
    found: list[str] = []

    def note() -> None:
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(f"{ROOT}/scd/")]
        found.append(f"{Path(frames[-1].filename).name} {frames[-1].name}")

    with monkeypatch.context() as patch, Operators(note):
        for name in READS:
            plain = getattr(torch.Tensor, name)

            def read(tensor: torch.Tensor, *args: Any, plain: Any = plain, **kwargs: Any) -> Any:
                note()
                with torch.utils._python_dispatch._disable_current_modes():
                    return plain(tensor, *args, **kwargs)

            patch.setattr(torch.Tensor, name, read)
        yield found


@pytest.mark.parametrize(
    "more",
    [
        ["optim.muon_lr=null"],
        ["optim.muon_lr=1e-3", "flow.history_noise_max=0.3"],
        [*DENSE, "train.gradient_checkpointing=true"],
        ["train.gradient_accumulation=2", "autoencoder.path=AUTOENCODER", "model.patch_size=2"],
        ["data.max_broken_clips=1"],
    ],
    ids=["adamw", "muon", "dense", "video", "broken clips"],
)
def test_a_step_waits_once(
    more: list[str],
    monkeypatch: pytest.MonkeyPatch,
    doom_root: Path,
    tiny_autoencoder_path: str,
    tmp_path: Path,
) -> None:
    more = [text.replace("AUTOENCODER", tiny_autoencoder_path) for text in more]
    options = load_options(
        OPTIONS,
        [
            *(f"data.root={doom_root}", f"output_root={tmp_path}", "name=waits"),
            *("data.source=video", "autoencoder.path=null", "data.frames=4", "model.patch_size=16"),
            *("model.heads=1", "model.encoder_layers=1", "model.decoder_layers=1"),
            *("train.steps=4", "train.workers=0", "train.batch_size=2", "eval.videos=1"),
            *("eval.context_frames=1", "eval.new_frames=2"),
            *more,
        ],
    )
    accelerator = make_accelerator(options)
    trainer = Trainer(options, build_task(options, accelerator), accelerator)
    request = SimpleNamespace(signal=None)
    with training_batches(0, trainer.clips, options.train, accelerator) as batches:
        read = [next(batches) for _ in range(4)]
        first, second = iter(read[:2]), iter(read[2:])
        trainer._train_step(first, request)  # type: ignore[arg-type]
        with watched(monkeypatch) as found:  # now the optimizer has its moments
            trainer._train_step(second, request)  # type: ignore[arg-type]
    # The clips' numbers never were on the device.
    of_host = ("trainer.py _train_step", "faults.py pop_from")
    assert [place for place in found if place not in of_host] == ["faults.py any_process"]
    assert "trainer.py _train_step" in found  # so reads are seen
