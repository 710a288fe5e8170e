"""CUDA's code paths without CUDA: fake tensors that say they are on `cuda:0`.

They compute nothing, but find what would fail on a GPU, or wait for it: tensors on mixed devices,
masks of another size, masks too large for memory, values that are read. Forward only:
autograd's engine wants a real device.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.attention.flex_attention import BlockMask

import scd.flow.sampler
import scd.rollout.engine
import scd.rollout.resampling
from scd.models import SCD, CausalDiT, WorldModel, attention, rotary
from scd.models.autoencoder import LatentCodec
from scd.models.decoder import FUSIONS
from scd.options import FlowOptions, Options, RolloutOptions
from scd.rollout import Rollout
from scd.rollout.resampling import Resampling
from scd.training.build import make_objective
from scd.training.faults import is_bad_step
from scd.training.optimizer import OptimizedModel
from scd.utils import seeding

CUDA = torch.device("cuda:0")
B, CHANNELS = 2, 4


@pytest.fixture(autouse=True)
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything inside is fake, but for what reads settings or needs a CUDA generator."""
    levels = scd.flow.sampler.noise_levels

    def real_levels(*arguments, **keywords):
        with unset_fake_temporarily():
            return levels(*arguments, **keywords)

    def checked(model: WorldModel, conditions: Tensor) -> None:
        assert conditions.device.type == "cpu"

    def flex(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Tensor:
        assert block_mask.kv_num_blocks.device == block_mask.kv_indices.device == q.device
        assert block_mask.seq_lengths == (q.shape[2], k.shape[2])
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    monkeypatch.setattr(scd.rollout.engine, "noise_levels", real_levels)
    monkeypatch.setattr(scd.rollout.resampling, "draw_resampling", lambda *of: Resampling(0.7, 1))
    monkeypatch.setattr(seeding, "generator", lambda device, *key: None)
    monkeypatch.setattr(WorldModel, "check_conditions", checked)
    monkeypatch.setattr(attention, "_flex", flex)
    for cached in (attention._cached_block_mask, rotary._cached_tables):
        cached.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
    for cached in (attention._cached_block_mask, rotary._cached_tables):
        cached.cache_clear()


def make(kind: type, **config) -> WorldModel:
    layers = {"layers": 1} if kind is CausalDiT else {"encoder_layers": 1, "decoder_layers": 1}
    condition = {"condition": "action", "num_conditions": 3}
    with CUDA:
        return kind(**{"channels": CHANNELS, "heads": 1, **condition, **layers, **config})


@pytest.mark.parametrize("kind", [SCD, CausalDiT])
@pytest.mark.parametrize(
    ("config", "flow"),
    [
        ({}, {}),
        ({}, {"encoder_input": "noisy"}),
        ({}, {"encoder_input": "mixed"}),
        ({}, {"history_noise_max": 0.2}),
        ({}, {"self_forcing_prob": 1.0}),
        ({"first_frame": True}, {}),
        ({"prediction": "data"}, {}),
        ({"encoder_frame": "noise"}, {"self_forcing_prob": 1.0}),
    ],
)
@pytest.mark.parametrize("flex", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_forward(kind, config, flow, flex, checkpointing, monkeypatch):
    if kind is CausalDiT and "encoder_frame" in config:
        pytest.skip("the dense baseline has no encoder")
    if flex:  # as with many tokens
        monkeypatch.setattr(attention, "MASKED_TOKENS", 0)
    frames, side = 4, 2
    model = make(kind, **config)
    model.set_gradient_checkpointing(checkpointing)
    batch = {
        "sample": [0, 1],
        "step": 1,
        "latents": torch.empty(B, frames, CHANNELS, side, side, device=CUDA),
        "actions": torch.zeros(B, frames, dtype=torch.long, device=CUDA),
    }
    loss = make_objective(model, FlowOptions(**flow), 0)(batch)["loss"]
    assert loss.device == CUDA and loss.dtype == torch.float32 and loss.requires_grad


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion(fusion, monkeypatch):
    test_a_training_forward(SCD, {"fusion": fusion}, {}, False, False, monkeypatch)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (SCD, {}),
        (SCD, {"encoder_frame": "noise"}),
        (SCD, {"encoder_frame": "joint"}),
        (CausalDiT, {}),
    ],
)
@pytest.mark.parametrize(
    ("settings", "known", "side"),
    [
        ({"guidance": "none"}, 5, 2),
        ({"guidance": "condition"}, 5, 2),
        ({"guidance": "context"}, 5, 2),
        ({"guidance": "none", "solver": "consistency", "first_frame_steps": 4}, 5, 2),
        ({"guidance": "none", "window": 4}, 9, 2),
        ({"guidance": "none", "window": 4, "sink_frames": 2}, 9, 2),
        ({"guidance": "none"}, 40, 6),
        ({"guidance": "none"}, 0, 2),
    ],
)
def test_a_rollout(kind, config, settings, known, side):
    """Of a context on the CPU, as it comes from a loader."""
    if kind is CausalDiT and settings["guidance"] == "context":
        pytest.skip("the dense baseline has no context to perturb")
    model = make(kind, first_frame=not known, **config).eval()
    rollout = Rollout(model, RolloutOptions(2, **settings), known + 2)
    rollout.reset(
        torch.empty(B, known, CHANNELS, side, side, device="cpu"),
        torch.zeros(B, known, dtype=torch.long, device="cpu"),
    )
    for _ in range(2):
        frame = rollout.step(torch.zeros(B, dtype=torch.long, device="cpu"))
    assert frame.device == CUDA and frame.shape == (B, CHANNELS, side, side)


def test_a_rollout_asks_no_kernel_that_plans_for_each_length(monkeypatch):
    """cuDNN does, torch's first choice on Hopper in bf16: a plan for every frame of a rollout."""
    asked = []

    def watched(q, k, v, **keywords):
        asked.append(torch.backends.cuda.cudnn_sdp_enabled())
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **keywords)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", watched)
    rollout = Rollout(make(SCD).eval(), RolloutOptions(3, guidance="none"), 7)
    rollout.reset(torch.empty(B, 5, CHANNELS, 2, 2), torch.zeros(B, 5, dtype=torch.long))
    rollout.step(torch.zeros(B, dtype=torch.long))
    assert asked and not any(asked)
    assert torch.backends.cuda.cudnn_sdp_enabled()  # elsewhere as before


def test_an_autoencoder_s_numbers_lie_where_its_weights_do():
    with CUDA:
        autoencoder = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    codec = LatentCodec(autoencoder)
    assert codec.shift.device == codec.factor.device == CUDA
    latents = codec.encode(torch.empty(1, 2, 3, 8, 8, device=CUDA))
    assert codec.decode(latents).device == CUDA


def test_the_norm_of_no_gradient_lies_where_the_loss_does():
    """As in the steps of distribution matching that update the critic alone."""
    network = torch.nn.Linear(2, 2, device=CUDA)
    learner = OptimizedModel(network, [{"params": list(network.parameters())}], Options(), True)
    accelerator = SimpleNamespace(device=CUDA, clip_grad_norm_=torch.nn.utils.clip_grad_norm_)
    norm = learner.clip_gradient(accelerator)
    assert norm.device == CUDA
    assert is_bad_step(torch.zeros((), device=CUDA), [norm], None).device == CUDA


def test_block_masks_are_never_dense():
    """Of the paper's dense baseline on Minecraft: 299 clean and 2·299 noisy frames of 64 tokens."""
    n, clean, draws = 64, 299, 2
    tokens = (clean + draws * clean) * n
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel() * out.element_size())
            return out

    with Sizes():
        mask = attention.clean_context_block_mask(n, clean, 1, tokens, CUDA)
    assert mask.kv_indices.shape[-2:] == (449, 449)
    assert 0 < largest < 2**25  # bytes; a dense mask alone would have 3.3e9
