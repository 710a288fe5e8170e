"""Do writing context and denoising pull the shared parameters the same way?

Under teacher forcing, the loss of a frame depends on the parameters along two paths. The
*denoising* path is all that is computed at noisy tokens. The *writing* path is all that is computed
at clean tokens, as far as noisy tokens read it: the clean tokens' keys and values in every layer of
a dense model, the context in an SCD. SGF+ (arXiv 2610.10429) reports that the two conflict where
they share parameters, in a dense model trained on its own rollouts, and separates the parameters.

The gradient through each path holds the other's use of the parameters constant. Cut the graph
where noisy tokens read what clean ones wrote: the loss's gradient behind the cut is g_denoise; with
u what was written and ∂L/∂u the gradient at the cut, g_write = (∂L/∂u)·(∂u/∂θ). Their sum is the
gradient of training, exactly, and neither is a difference of two large ones. An entry of a
parameter is *shared* if both gradients there are not zero; that leaves out what only noisy tokens
need, such as the output layer and in the last layer the queries and the MLP.

How to read the cosine on the shared entries:
- One clip's two gradients come from the same noise and the same residual. The cosine between
  *different* clips shows what is systematic, and that of two gradients of the same path how much
  there is to find.
- Where training has converged, the two add up to zero over all clips and noise levels. What is
  left in a single clip is mostly its own; a large systematic part remains only at noise levels
  that training hardly draws.
- Before the first training step only the output layer has a gradient. A model at initialization
  has no cosine.
- An SCD shares no parameter, and has no cosine. Its norms compare: how much of the training signal
  goes into writing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scd.analysis.interventions import cut_context, named_blocks
from scd.analysis.measurements import ProbeClips, loss_noise
from scd.flow.objective import LEVELS, errors_by_level
from scd.models import CausalWorldModel
from scd.utils.precision import autocast, float32_products

OUTSIDE = "outside"  # of the layers: embeddings, output norm, output layer
ALL = "all"
PATHS = ("writing", "denoising")
PAIRS = ("writing – denoising", "writing – writing", "denoising – denoising")


@dataclass(frozen=True)
class PathGradients:
    """How the gradients of n clips through both paths compare, by noise level.

    The groups of parameters are every layer, what is outside of them, and all. Cosines are on the
    shared entries, and 0 where there are none.
    """

    groups: list[str]
    parameters: Tensor  # (groups, 3), numbers of them used in writing only, in both, in denoising
    squares: Tensor  # (n, PATHS, levels, groups), |g|² over all parameters, shared or not
    cosine: Tensor  # (n, levels, groups), of g_write and g_denoise of the same clip
    between: Tensor  # (n // 2, PAIRS, levels, groups), of two different clips

    @property
    def shares(self) -> bool:
        """Whether any parameter is used on both paths."""
        return bool(self.parameters[-1, 1])


def measure_gradients(
    model: CausalWorldModel,
    clips: ProbeClips,
    seed: int,
    on_clip: Callable[[], object] = lambda: None,
) -> PathGradients:
    """Compute both gradients of every clip at every noise level, and their cosines.

    Args:
        on_clip: called after every clip and level.
    """
    groups = group_parameters(model)
    parameters = [parameter for group in groups.values() for parameter in group]
    sizes = [sum(parameter.numel() for parameter in group) for group in groups.values()]
    writes = torch.zeros(sum(sizes), dtype=torch.bool, device=model.device)
    denoises = writes.clone()
    squares, cosine, between = [], [], []  # of every level and clip
    for level in LEVELS:
        waiting = None  # for the second clip of its pair
        for clip in clips.parts(1):
            write, denoise = path_gradients(model, parameters, clip, seed, level)
            in_write, in_denoise = write != 0, denoise != 0
            writes |= in_write
            denoises |= in_denoise
            squares.append(torch.stack([_dots(x, x, sizes) for x in (write, denoise)]))
            shared = in_write & in_denoise
            pair = write * shared, denoise * shared
            cosine.append(_cosines(*pair, sizes))
            if waiting is not None:  # no clip is in two pairs: they are drawn again as independent
                between.append(_across(pair, waiting, sizes))
            waiting = pair if waiting is None else None
            on_clip()
    used = torch.stack([writes & ~denoises, writes & denoises, ~writes & denoises])
    return PathGradients(
        [*groups, ALL],
        torch.stack([_with_total([x.sum() for x in kind.split(sizes)]) for kind in used]).T.long(),
        *(
            torch.stack(values).unflatten(0, (len(LEVELS), -1)).movedim(0, -2)
            for values in (squares, cosine, between)
        ),
    )


def group_parameters(model: CausalWorldModel) -> dict[str, list[nn.Parameter]]:
    """List the parameters of every layer, and those outside of all layers."""
    groups = {name: list(block.parameters()) for name, block in named_blocks(model).items()}
    inside = {id(parameter) for group in groups.values() for parameter in group}
    outside = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    return {**groups, OUTSIDE: outside}


def path_gradients(
    model: CausalWorldModel,
    parameters: Sequence[nn.Parameter],
    clip: ProbeClips,
    seed: int,
    level: float,
) -> tuple[Tensor, Tensor]:
    """Compute one clip's g_write and g_denoise at a noise level.

    Args:
        parameters: those to derive by; the gradients are one vector each, in their order.
    """
    clean_frames = clip.latents.shape[1] - 1
    clean_tokens = clean_frames * model.tokens_per_frame(*clip.latents.shape[-2:])
    noise, precision = loss_noise(model, clip, seed), clip.precision
    with cut_context(model, clean_tokens) as cuts, float32_products(precision):
        with autocast(model.device, precision):
            conditions = clip.conditions(model)
            errors = errors_by_level(model, clip.latents, conditions, noise, levels=(level,))
        written, read = zip(*cuts, strict=True)
        denoise, at_cuts = _gradients([errors.mean()], parameters, read, None)
        write, _ = _gradients(written, parameters, (), at_cuts)
    return write, denoise


def _gradients(
    outputs: Sequence[Tensor],
    parameters: Sequence[nn.Parameter],
    others: Sequence[Tensor],
    behind: Sequence[Tensor] | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Derive outputs by parameters, as one vector, and by other tensors.

    Args:
        behind: the gradients at the outputs, for the chain rule.
    """
    found = torch.autograd.grad(
        outputs, [*parameters, *others], behind, retain_graph=True, materialize_grads=True
    )
    vector = torch.cat([gradient.flatten() for gradient in found[: len(parameters)]])
    return vector.float(), found[len(parameters) :]


def _with_total(by_group: Sequence[Tensor]) -> Tensor:
    """Append the sum of all groups: (groups,)."""
    values = torch.stack([*by_group]).double().cpu()
    return torch.cat([values, values.sum(dim=0, keepdim=True)])


def _dots(one: Tensor, other: Tensor, sizes: list[int]) -> Tensor:
    """Multiply two vectors for each group of parameters, and for all: (groups,)."""
    return _with_total([*map(torch.dot, one.split(sizes), other.split(sizes))])


def _cosines(one: Tensor, other: Tensor, sizes: list[int]) -> Tensor:
    norms = (_dots(one, one, sizes) * _dots(other, other, sizes)).sqrt()
    return _dots(one, other, sizes) / norms.clamp(min=torch.finfo(norms.dtype).tiny)


def _across(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], sizes: list[int]) -> Tensor:
    """Compare the gradients (g_write, g_denoise) of two clips: (PAIRS, groups)."""
    paths = (_cosines(one[0], other[1], sizes) + _cosines(other[0], one[1], sizes)) / 2
    same = [_cosines(mine, its, sizes) for mine, its in zip(one, other, strict=True)]
    return torch.stack([paths, *same])
