"""The exported graphs: onnxruntime in Python makes the frames that the rollout engine makes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript", reason="the extra scd[web] is not installed")
pytest.importorskip("onnxruntime", reason="the extra scd[web] is not installed")

from scd.options import RolloutOptions
from scd.play.worlds import Pretrained, load_pretrained
from scd.rollout import Rollout
from scd.web.graphs import make_graphs
from scd.web.onnx_export import export_graph
from scd.web.onnx_rollout import OnnxRollout, all_levels
from tests.play import pretrained_folder

SHIPPED = Path(__file__).parent.parent / "assets/pretrained/scd_doom"
FRAMES = 100
WITHIN = 1e-3  # of latents after 100 frames


def write_graphs(pretrained: Pretrained, folder: Path, levels: list[float], window: int) -> Path:
    """Export the graphs of a model in float32."""
    size = pretrained.options.data.frame_size
    graphs = make_graphs(pretrained.model, pretrained.codec, size, window, levels)
    for name, graph in graphs.items():
        export_graph(graph, folder / f"{name}.onnx", "fp32")
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tiny_autoencoder_path) -> tuple[Pretrained, Path, list[float]]:
    root = tmp_path_factory.mktemp("web")
    pretrained = load_pretrained(pretrained_folder(root / "tiny", tiny_autoencoder_path))
    levels = all_levels(pretrained.options.rollout, range(1, 5))
    return pretrained, write_graphs(pretrained, root, levels, 4), levels


def largest_difference(
    pretrained: Pretrained, folder: Path, settings: RolloutOptions, levels: list[float], frames: int
) -> float:
    """Continue three frames of noise by both, with the same generator; compare latents."""
    rng = torch.Generator().manual_seed(3)
    codec = pretrained.codec
    side = pretrained.options.data.frame_size // codec.downsampling
    context = torch.randn(1, 3, codec.channels, side, side, generator=rng)
    actions = torch.randint(0, 4, (frames + 3,), generator=rng).tolist()
    engine = Rollout(pretrained.model, settings)
    engine.reset(context, torch.tensor([actions[:3]]), generator=torch.Generator().manual_seed(7))
    ours = OnnxRollout(folder, settings, levels)
    ours.reset(context[0].numpy(), actions[:3], torch.Generator().manual_seed(7))
    largest = 0.0
    for action in actions[3:]:
        expected = engine.step(torch.tensor([action]))[0].numpy()
        largest = max(largest, float(np.abs(ours.step(action) - expected).max()))
    return largest


@pytest.mark.parametrize(
    "changes",
    [
        {"solver": "multistep", "sink_frames": 1},
        {"solver": "euler", "steps": 3},
        {"solver": "consistency", "steps": 3},
        {"guidance": "context", "guidance_scale": 1.5, "steps": 1},
    ],
    ids=lambda changes: next(iter(changes.values())),
)
def test_latents_are_those_of_the_engine(tiny, changes: dict[str, Any]) -> None:
    pretrained, folder, levels = tiny
    settings = replace(pretrained.options.rollout, **changes)
    frames = FRAMES if settings.sink_frames else 12
    assert largest_difference(pretrained, folder, settings, levels, frames) < WITHIN


def test_the_shipped_model_after_100_frames(tmp_path) -> None:
    pretrained = load_pretrained(SHIPPED)
    settings = replace(pretrained.options.rollout, steps=2)
    levels = all_levels(settings, [2])
    folder = write_graphs(pretrained, tmp_path, levels, settings.window)
    found = largest_difference(pretrained, folder, settings, levels, FRAMES)
    print(f"the largest difference of latents in {FRAMES} frames is {found:.1e}")
    assert found < WITHIN
