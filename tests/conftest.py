"""What several tests need: a small recording of Doom and an untrained autoencoder."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from scd.doom.record import record_dataset
from scd.models.autoencoder import build_autoencoder
from scd.options import AutoencoderOptions, Options
from scd.training import step_cost
from scd.training.build import AnyCodec

torch.set_num_threads(min(2, torch.get_num_threads()))
SLOWEST = ("test_web_page.py", "test_posttrain.py", "test_own_data.py", "test_processes.py")

os.fsync = lambda number: None  # only where the power fails does it matter when files are on disk


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked as slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the slowest files, then those of most tests; whatever is last runs alone."""
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in set(slow)]
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in SLOWEST, -tests[item.path]))


@pytest.fixture(scope="session", autouse=True)
def counted_once() -> Iterator[None]:
    """Count what a step costs once for all runs of equal options: a fifth of a small run's time."""
    plain = step_cost.estimate_step
    known: dict[object, step_cost.StepEstimate] = {}

    def estimate_step(
        options: Options, codec: AnyCodec, counts_scores: bool = True
    ) -> step_cost.StepEstimate:
        anywhere = re.sub(r"'/[^']*'", "''", repr(options))  # whatever the folders are
        key = (anywhere, type(codec), codec.channels, codec.downsampling, counts_scores)
        if key not in known:
            known[key] = plain(options, codec, counts_scores)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_cost, "estimate_step", estimate_step)
        yield


@pytest.fixture(scope="session")
def doom_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 training and 2 validation episodes of 40 frames, 64x64. Copy it before changing it."""
    root = tmp_path_factory.mktemp("doom")
    record_dataset(root, train_episodes=3, val_episodes=2, frames=40, size=64)
    return root


@pytest.fixture(scope="session")
def tiny_autoencoder_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An autoencoder of random weights: 8 latent channels, 8x downsampling."""
    stages = {"block_types": ["ResBlock"] * 4, "channels": [8] * 4, "layers": [1] * 4}
    sides = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in stages.items()}
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("autoencoder")
    build_autoencoder(AutoencoderOptions(latent_channels=8, **sides)).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For the smallest of models: threads wait longer for each other than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """For tests that launch in this process: they neither find nor leave a launch's state."""
    forget_the_launch()
    yield
    forget_the_launch()


def forget_the_launch() -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
