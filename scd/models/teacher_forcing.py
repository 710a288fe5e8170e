"""Teacher forcing in one pass: the sequence [clean ‖ noisy], and which of its frames sees which."""

from functools import partial
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

from scd.models.attention import clean_context_attention, clean_context_block_mask, uses_flex
from scd.models.layers import Attend
from scd.models.world_model import CLEAN_TIMESTEP


class CleanAndNoisy(NamedTuple):
    """One sequence [clean ‖ noisy draw 1 ‖ … ‖ noisy draw K], of S frames.

    Clean are all frames of a clip but the last (or the last chunk), which no frame follows; noisy
    are the last F', in K draws.
    """

    frames: Tensor  # (B, S, C, H, W)
    timesteps: Tensor  # (B, S)
    conditions: Tensor | None  # (B, S) or (B, S, V + 1)
    positions: Tensor  # (S,)
    attend: Attend


def clean_and_noisy(
    clean: Tensor,
    noisy: Tensor,
    timesteps: Tensor,
    conditions: Tensor | None,
    tokens_per_frame: int,
    history_gradient: bool,
    chunk: int = 1,
    clean_timestep: float = CLEAN_TIMESTEP,
) -> CleanAndNoisy:
    """Put clean and noisy frames one after the other; see `clean_context_attention`.

    Args:
        clean: (B, F - chunk, C, H, W).
        noisy, timesteps: (B, K, F', C, H, W) and (B, K, F').
        conditions: (B, F) or (B, F, V + 1), of the clip's frames.
        history_gradient: see `WorldModel.forward`.
        chunk: frames that are denoised together, and see each other; F and F' are whole chunks.
    """
    count, (draws, predicted), device = clean.shape[1], noisy.shape[1:3], clean.device
    first = count + chunk - predicted
    frames = torch.cat([clean, rearrange(noisy, "b k f c h w -> b (k f) c h w")], dim=1)
    clean_times = timesteps.new_full(clean.shape[:2], clean_timestep)  # (B, F - chunk)
    times = torch.cat([clean_times, rearrange(timesteps, "b k f -> b (k f)")], dim=1)
    if conditions is not None:
        noisy_conditions = repeat(conditions[:, first:], "b f ... -> b (k f) ...", k=draws)
        conditions = torch.cat([conditions[:, :-chunk], noisy_conditions], dim=1)
    positions = torch.arange(count + chunk, device=device)
    positions = torch.cat([positions[:count], *[positions[first:]] * draws])
    # To attention, a chunk is one large frame.
    n, clean_chunks, first_chunk = tokens_per_frame * chunk, count // chunk, first // chunk
    block_mask = None
    if uses_flex(tokens := len(positions) * tokens_per_frame, device):
        block_mask = clean_context_block_mask(n, clean_chunks, first_chunk, tokens, device)
    attend = partial(
        clean_context_attention,
        tokens_per_frame=n,
        clean_frames=clean_chunks,
        first=first_chunk,
        block_mask=block_mask,
        history_gradient=history_gradient,
    )
    return CleanAndNoisy(frames, times, conditions, positions, attend)
