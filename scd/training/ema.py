"""Average a network's weights over training (EMA), with lengths chosen before or after it.

`EMA` is the exponential moving average that is validated and exported; `optim.ema_decay` sets its
length before training.

How long an average should be shows only in what it generates, and it depends on how long a run
becomes. So a run with `train.snapshot_every` tracks a few more averages of known lengths and keeps
snapshots of them (`PostHocEMA`); `scd ema` combines those to the average of any length, at the step
of any snapshot (Karras et al. 2024, arXiv 2312.02696, section 3 and appendix C).

Several plain EMAs would be less work, but each takes as much memory, their lengths have to be
guessed before the run, and they are deleted with old checkpoints. Snapshots cost disk instead: two
averages, in half precision, take as many bytes as one `ema.safetensors`. Checkpoints hold them in
full precision, so that a resumed run continues them to the bit.
"""

import json
import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from scd.errors import ScdError
from scd.models.weights import read_weights
from scd.options import MAX_SIGMA_REL, MIN_SIGMA_REL, Options, options_to_dict
from scd.utils.files import write_atomically
from scd.utils.processes import error_barrier, processes
from scd.utils.sharding import gather_on_cpu, shard_like

SNAPSHOTS = "snapshots"  # in the run's folder
MAX_MISFIT = 0.1  # of a profile; beyond it, the average would be one of another length

Profile = tuple[int, float]
"""The step up to which an average is taken, and its sigma_rel."""


class WeightAverage:
    """A moving average of a network's weights, sharded as they are.

    `torch.optim.swa_utils.AveragedModel` would average a deep copy of the network, which a sharded
    one does not allow.

    Args:
        network: prepared for training.
        saved: the average so far, full tensors by name; None: it begins with the weights.
    """

    def __init__(self, network: nn.Module, saved: dict[str, Tensor] | None):
        self.weights = averaged_tensors(network)
        self.average = {
            name: weight.detach().clone()
            if saved is None
            else shard_like(saved[name].to(weight.device), weight)
            for name, weight in self.weights.items()
        }

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Set the average to `decay` times itself plus 1 - `decay` times the weights."""
        for sharded in (False, True):  # one operation takes tensors of one kind only
            names = [n for n, w in self.weights.items() if isinstance(w, DTensor) == sharded]
            if not names:
                continue
            average = [self.average[name] for name in names]
            # In these three steps, and not by `lerp`: so checkpoints of earlier versions, which
            # used diffusers' EMAModel, are continued to the bit.
            change = torch._foreach_sub(average, [self.weights[name] for name in names])
            torch._foreach_mul_(change, 1 - decay)
            torch._foreach_sub_(average, change)


def averaged_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Name the tensors to average: parameters, and the running statistics of batch norms.

    The statistics of the newest weights would not be those of the averaged ones.
    """
    running = {
        name: buffer
        for name, buffer in network.named_buffers()
        if name.endswith(("running_mean", "running_var"))
    }
    return {**dict(network.named_parameters()), **running}


class EMA:
    """The exponential moving average of a network's weights that is validated and exported.

    Args:
        network: prepared for training.
        decay: its decay in the long run, see `ema_decay`.
        saved: the average so far, as `state` returned it; None at the start of a run.
    """

    def __init__(self, network: nn.Module, decay: float, saved: dict[str, Tensor] | None):
        self.network = network
        self.decay = decay
        self.mean = WeightAverage(network, saved)

    def update(self, step: int) -> None:
        """Average in the weights after `step` steps.

        The decay is a function of the step alone, whether steps before it were applied or not.
        """
        self.mean.update(ema_decay(step, self.decay))

    def state(self, keep: bool = True) -> dict[str, Tensor]:
        """Gather the network's state dict with averaged weights on the CPU; collective.

        Args:
            keep: see `gather_on_cpu`.
        """
        return gather_on_cpu({**self.network.state_dict(), **self.mean.average}, keep)

    def as_network(self) -> nn.Module:
        """Copy the network, with its averaged weights, to the CPU of every process; collective."""
        copy = type(self.network).from_config(self.network.config)  # type: ignore[attr-defined]
        copy.load_state_dict(self.state())
        return copy.eval()


def ema_decay(step: int, limit: float) -> float:
    """Compute the decay of a step, which rises to `limit`: it would hold short runs back.

    The warm-up is that of `diffusers.training_utils.EMAModel`.
    """
    return min(limit, step / (step + 9)) if step > 1 else 0.0


class PostHocEMA:
    """Averages in which the weights of step t count as t^γ.

    So their lengths are constant shares of the training so far.

    Args:
        network: prepared for training.
        options: without snapshots there are no averages.
        saved: the averages so far, as `state` returned them; empty at the start of a run.
    """

    def __init__(self, network: nn.Module, options: Options, saved: dict[str, Tensor]):
        self.options = options
        sigma_rels = options.optim.ema_sigma_rel if options.train.snapshot_every else []
        names = averaged_tensors(network)
        self.means = {
            sigma_rel: WeightAverage(
                network, {n: saved[_key(sigma_rel, n)] for n in names} if saved else None
            )
            for sigma_rel in sigma_rels
        }

    def update(self, step: int) -> None:
        """Average in the weights after `step` steps: β = (1 - 1/t)^(γ + 1) (section 3.1)."""
        for sigma_rel, mean in self.means.items():
            mean.update((1 - 1 / step) ** (gamma(sigma_rel) + 1))

    def state(self, keep: bool = True) -> dict[str, Tensor]:
        """Gather all averages on the CPU, named `sigma_rel/name`; collective.

        Args:
            keep: see `gather_on_cpu`.
        """
        named = {
            _key(sigma_rel, name): tensor
            for sigma_rel, mean in self.means.items()
            for name, tensor in mean.average.items()
        }
        return gather_on_cpu(named, keep)

    def write_snapshot(self, step: int) -> None:
        """Write the averages to the run's snapshots, in half precision; collective.

        Raises:
            ScdError: the disk is full, or the like.
        """
        main = processes().is_main_process
        averages = self.state(main)
        path = self.options.output / SNAPSHOTS / f"step-{step:08d}.safetensors"
        metadata = {"options": json.dumps(options_to_dict(self.options)), "step": str(step)}
        with error_barrier():
            if main:
                halves = {name: tensor.half() for name, tensor in averages.items()}
                write_atomically(path, lambda aside: save_file(halves, aside, metadata))


def set_newer_snapshots_aside(output: Path, step: int) -> None:
    """Rename the snapshots beyond the checkpoint of `step` to `passed-over-step-…`.

    An interrupted run left them. It writes them again; a run that starts anew has others.
    """
    for found, path in _snapshots(output).items():
        if found > step:
            path.rename(path.with_name(f"passed-over-{path.name}"))


def write_average(output: Path, sigma_rel: float, step: int | None, out: Path) -> None:
    """Combine a run's snapshots to the average of a length; print how well its profile is met.

    Args:
        output: the run's folder.
        sigma_rel: the length, as a share of the training up to `step`.
        step: up to which the average is taken; None: that of the newest snapshot.
        out: a `.safetensors` file, which every command takes as it takes `ema.safetensors`.

    Raises:
        ScdError: there is no snapshot of this step, one is damaged, or the snapshots are too few or
            their lengths too different for an average of this one.
    """
    if out.suffix != ".safetensors":
        raise ScdError(f"--out {out}: the name of a weights file ends in .safetensors")
    if not MIN_SIGMA_REL <= sigma_rel <= MAX_SIGMA_REL:
        limits = f"{MIN_SIGMA_REL:g} and {MAX_SIGMA_REL}"
        raise ScdError(f"--sigma-rel {sigma_rel}: must lie between {limits}")
    snapshots = _snapshots(output)
    if not snapshots:
        raise ScdError(f"{output}: no snapshots in {SNAPSHOTS}/; train.snapshot_every writes them")
    step = max(snapshots) if step is None else step
    if step not in snapshots:
        known = ", ".join(map(str, snapshots))
        raise ScdError(f"--step {step}: no snapshot of this step; there are {known}")
    used = {found: path for found, path in snapshots.items() if found <= step}
    kept, metadata = read_weights(snapshots[step])
    sigma_rels = _sigma_rels(set(kept), snapshots[step])
    profiles = list(product(used, sigma_rels))
    shares, misfit = fit(profiles, (step, sigma_rel))
    if misfit > MAX_MISFIT:
        raise ScdError(
            f"--sigma-rel {sigma_rel}: {len(used)} snapshots of sigma_rel "
            f"{', '.join(map(str, sigma_rels))} up to step {step} meet it only to within "
            f"{misfit:.0%}; choose a length nearer to theirs, or write more snapshots"
        )
    share_of = dict(zip(profiles, shares, strict=True))
    average: dict[str, Tensor] = {}
    for found, path in used.items():
        tensors = read_weights(path)[0]
        if {key: t.shape for key, t in tensors.items()} != {k: t.shape for k, t in kept.items()}:
            raise ScdError(f"{path}: not from the same run as {snapshots[step].name}")
        for key, tensor in tensors.items():
            of, _, name = key.partition("/")
            term = float(share_of[found, float(of)]) * tensor.float()
            average[name] = average[name] + term if name in average else term
    metadata |= {"sigma_rel": str(sigma_rel)}
    write_atomically(out, lambda aside: save_file(average, aside, metadata))
    print(
        f"{out}: sigma_rel {sigma_rel} at step {step}, from {len(used)} snapshots; its profile is "
        f"met to within {misfit:.2%}"
    )


def fit(profiles: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """Fit a combination of averages to a wanted profile, by least squares (section 3.2).

    Returns:
        The weight of each average; the remaining distance, over the wanted profile's norm.
    """
    gram, onto = inner_products(profiles, profiles), inner_products(profiles, [wanted])[:, 0]
    # Neighbouring snapshots are nearly the same, so many combinations fit. This is the smallest:
    # large weights of opposite signs would amplify the rounding to half precision.
    shares = np.linalg.lstsq(gram, onto, rcond=1e-10)[0]
    norm = float(inner_products([wanted], [wanted])[0, 0])
    left = norm - 2 * shares @ onto + shares @ gram @ shares
    return shares / shares.sum(), math.sqrt(max(left, 0.0) / norm)


def inner_products(ones: Sequence[Profile], others: Sequence[Profile]) -> np.ndarray:
    """Compute ∫ p(t) q(t) dt for each p of `ones` (rows) and q of `others` (columns).

    p(t) is (γ + 1) t^γ / T^(γ + 1) up to its step T (appendix C).
    """
    (a, gamma_a), (b, gamma_b) = (
        np.array([(step, gamma(sigma_rel)) for step, sigma_rel in profiles]).T
        for profiles in (ones, others)
    )
    a, gamma_a = a[:, None], gamma_a[:, None]
    first = np.minimum(a, b)
    overlap = (first / a) ** gamma_a * (first / b) ** gamma_b / np.maximum(a, b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * overlap


def gamma(sigma_rel: float) -> float:
    """Compute the exponent γ of a profile from its relative standard deviation (appendix C).

    The largest root of σ² = (γ + 1) / ((γ + 2)² (γ + 3)).
    """
    variance = sigma_rel**-2
    return float(np.roots([1, 7, 16 - variance, 12 - variance]).real.max())


def _key(sigma_rel: float, name: str) -> str:
    return f"{sigma_rel}/{name}"


def _snapshots(output: Path) -> dict[int, Path]:
    """List a run's snapshots by their steps, in order."""
    paths = sorted((output / SNAPSHOTS).glob("step-????????.safetensors"))
    numbers = [path.stem.removeprefix("step-") for path in paths]
    return {int(n): path for n, path in zip(numbers, paths, strict=True) if n.isdecimal()}


def _sigma_rels(keys: set[str], path: Path) -> list[float]:
    """Read the lengths of a snapshot's averages from its keys."""
    try:
        found = sorted({float(key.partition("/")[0]) for key in keys})
    except ValueError as error:
        raise ScdError(f"{path}: not a snapshot of averages") from error
    if not found or found[0] <= 0:
        raise ScdError(f"{path}: not a snapshot of averages")
    return found
