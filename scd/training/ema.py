"""Average a network's weights over training (EMA), with lengths chosen before or after it.

`EMA` is the exponential moving average that is validated and exported. Post-hoc EMA chooses its
length after training.

Post-hoc EMA: a mean of a run's weights whose length is chosen after training.

How long an average should be shows only in what it generates, and it depends on how long a run
becomes. So a run with `train.snapshot_every` tracks a few averages of known lengths and keeps
snapshots of them; `scd ema` combines those to the average of any length, at the step of any
snapshot (Karras et al. 2024, arXiv 2312.02696, section 3 and appendix C).

Several exponential averages in each checkpoint would be less work, but each costs as much memory
as one of these, their lengths have to be guessed before the run, and they are gone with the
checkpoints. What this costs instead is disk: a snapshot holds the averages in half precision, with
two of them as many bytes as one `ema.safetensors`. In checkpoints they lie in full, so that a
resumed run goes on with them to the bit.
"""

import json
import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from scd.errors import ScdError
from scd.models.weights import read_weights
from scd.options import MAX_SIGMA_REL, Options, options_to_dict
from scd.training.sharding import sharded_like, whole_on_cpu
from scd.utils.files import write_atomically
from scd.utils.processes import error_barrier, processes


class EMA:
    """Its decay starts low and rises to `decay`, so that short runs are not held back.

    Args:
        network: prepared for training.
        saved: the mean so far, as `state` gave it.
    """

    def __init__(self, network: nn.Module, decay: float, saved: dict[str, Tensor] | None):
        self.network = network
        averaged = averaged_tensors(network)
        self.ema = EMAModel(averaged.values(), decay=decay)
        if saved is not None:
            self.ema.shadow_params = [
                sharded_like(saved[name].to(tensor.device), tensor)
                for name, tensor in averaged.items()
            ]

    def add(self, step: int) -> None:
        """Take in the weights after so many steps."""
        # The decay is a function of the step alone: after steps that were not applied as well.
        self.ema.optimization_step = step - 1
        self.ema.step(averaged_tensors(self.network).values())

    def state(self, keep: bool = True) -> dict[str, Tensor]:
        """The network's state dict with averaged weights, whole, on the CPU.

        Args:
            keep: see `whole_on_cpu`.
        """
        averages = zip(averaged_tensors(self.network), self.ema.shadow_params, strict=True)
        return whole_on_cpu({**self.network.state_dict(), **dict(averages)}, keep)

    def as_network(self) -> nn.Module:
        """A copy of the network with its averaged weights, whole on every process."""
        copy = type(self.network).from_config(self.network.config)  # type: ignore[attr-defined]
        copy.load_state_dict(self.state())
        return copy.eval()


def averaged_tensors(network: nn.Module) -> dict[str, nn.Parameter]:
    """What the mean over steps is taken of: parameters, and the running statistics of batch norms.

    Those come as parameters that share their memory: `EMAModel` averages what takes a gradient and
    copies the rest. Copied statistics would be those of the newest weights, not of the mean.
    """
    running = {
        name: nn.Parameter(buffer)
        for name, buffer in network.named_buffers()
        if name.endswith(("running_mean", "running_var"))
    }
    return {**dict(network.named_parameters()), **running}


SNAPSHOTS = "snapshots"  # in the run's folder
WORST_FIT = 0.1  # of a profile, beyond which another one would be sold under its name

Profile = tuple[int, float]
"""An average after so many steps, and its sigma_rel."""


class PostHocEMA:
    """Averages in which the weights of step t count as t^γ: as long, always, as the same share of
    the training so far.

    Args:
        network: prepared for training.
        options: without snapshots there are no averages either.
        saved: the averages so far, as `state` gave them; empty at the start.
    """

    def __init__(self, network: nn.Module, options: Options, saved: dict[str, Tensor]):
        self.options = options
        self.tensors = averaged_tensors(network)
        sigma_rels = options.optim.ema_sigma_rel if options.train.snapshot_every else []
        self.means = {
            sigma_rel: [
                sharded_like(saved[_key(sigma_rel, name)].to(tensor.device), tensor)
                if saved
                else tensor.detach().clone()
                for name, tensor in self.tensors.items()
            ]
            for sigma_rel in sigma_rels
        }

    def add(self, step: int) -> None:
        """Take in the weights after so many steps: β = (1 - 1/t)^(γ + 1) (section 3.1)."""
        for sigma_rel, means in self.means.items():
            decay = (1 - 1 / step) ** (gamma(sigma_rel) + 1)
            get_ema_multi_avg_fn(decay)(means, list(self.tensors.values()), None)

    def state(self, keep: bool = True) -> dict[str, Tensor]:
        """All averages under `sigma_rel/name`, whole, on the CPU; collective.

        Args:
            keep: see `whole_on_cpu`.
        """
        named = {
            _key(sigma_rel, name): mean
            for sigma_rel, means in self.means.items()
            for name, mean in zip(self.tensors, means, strict=True)
        }
        return whole_on_cpu(named, keep)

    def write_snapshot(self, step: int) -> None:
        """Keep the averages as they are after so many steps; collective.

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


def gamma(sigma_rel: float) -> float:
    """The exponent of a profile (appendix C): the largest root of what its standard deviation,
    σ² = (γ + 1) / ((γ + 2)² (γ + 3)), says."""
    variance = sigma_rel**-2
    return float(np.roots([1, 7, 16 - variance, 12 - variance]).real.max())


def set_aside_newer_snapshots(output: Path, step: int) -> None:
    """Rename what an interrupted run kept beyond the checkpoint that is gone on from.

    The run writes them again; where it starts anew, they are another one's.
    """
    for found, path in _snapshots(output).items():
        if found > step:
            path.rename(path.with_name(f"passed-over-{path.name}"))


def write_average(output: Path, sigma_rel: float, step: int | None, out: Path) -> None:
    """Write the average of a length to a weights file, of a run's snapshots; say how well it fits.

    Args:
        output: the run's folder.
        step: at the end of which the average is taken; None: that of the newest snapshot.
        out: a `.safetensors` file, which every command takes as it takes `ema.safetensors`.

    Raises:
        ScdError: there is no such snapshot, one of them is damaged, or too few of them or of too
            different a length are there for an average of this one.
    """
    if out.suffix != ".safetensors":
        raise ScdError(f"--out {out}: weights are written to a file that ends in .safetensors")
    if not 0 < sigma_rel <= MAX_SIGMA_REL:
        raise ScdError(f"--sigma-rel {sigma_rel}: must lie above 0, and not above {MAX_SIGMA_REL}")
    snapshots = _snapshots(output)
    if not snapshots:
        raise ScdError(
            f"{output}: no snapshots in {SNAPSHOTS}/; a run keeps them with train.snapshot_every"
        )
    step = max(snapshots) if step is None else step
    if step not in snapshots:
        known = ", ".join(map(str, snapshots))
        raise ScdError(f"--step {step}: no snapshot of it; there are {known}")
    used = {found: path for found, path in snapshots.items() if found <= step}
    kept, metadata = read_weights(snapshots[step])
    sigma_rels = _sigma_rels(set(kept), snapshots[step])
    profiles = list(product(used, sigma_rels))
    shares, misfit = fit(profiles, (step, sigma_rel))
    if misfit > WORST_FIT:
        raise ScdError(
            f"--sigma-rel {sigma_rel}: {len(used)} snapshots of sigma_rel "
            f"{', '.join(map(str, sigma_rels))} up to step {step} meet it to within "
            f"{misfit:.0%} only; take a length nearer to theirs, or more of them"
        )
    share_of = dict(zip(profiles, shares, strict=True))
    average: dict[str, Tensor] = {}
    for found, path in used.items():
        tensors = read_weights(path)[0]
        if {key: t.shape for key, t in tensors.items()} != {k: t.shape for k, t in kept.items()}:
            raise ScdError(f"{path}: not of the same run as {snapshots[step].name}")
        for key, tensor in tensors.items():
            of, _, name = key.partition("/")
            term = float(share_of[found, float(of)]) * tensor.float()
            average[name] = average[name] + term if name in average else term
    metadata |= {"sigma_rel": str(sigma_rel)}
    write_atomically(out, lambda aside: save_file(average, aside, metadata))
    print(
        f"{out}: sigma_rel {sigma_rel} at step {step}, of {len(used)} snapshots; its profile is "
        f"met to within {misfit:.2%}"
    )


def fit(profiles: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """Find the combination of averages whose profile is nearest to a wanted one (section 3.2).

    Returns:
        The share of each profile; the distance that is left, over the wanted profile's norm.
    """
    gram, onto = inner_products(profiles, profiles), inner_products(profiles, [wanted])[:, 0]
    # Neighbouring snapshots are nearly the same. Of the combinations that do, the smallest:
    # large shares of opposite signs would raise the rounding of what is kept in half precision.
    shares = np.linalg.lstsq(gram, onto, rcond=1e-10)[0]
    norm = float(inner_products([wanted], [wanted])[0, 0])
    left = norm - 2 * shares @ onto + shares @ gram @ shares
    return shares / shares.sum(), math.sqrt(max(left, 0.0) / norm)


def inner_products(ones: Sequence[Profile], others: Sequence[Profile]) -> np.ndarray:
    """∫ p(t) q(t) dt for each p of `ones` (rows) and q of `others`, where p(t) is
    (γ + 1) t^γ / T^(γ + 1) up to its step T (appendix C)."""
    (a, gamma_a), (b, gamma_b) = (
        np.array([(step, gamma(sigma_rel)) for step, sigma_rel in profiles]).T
        for profiles in (ones, others)
    )
    a, gamma_a = a[:, None], gamma_a[:, None]
    first = np.minimum(a, b)
    overlap = (first / a) ** gamma_a * (first / b) ** gamma_b / np.maximum(a, b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * overlap


def _key(sigma_rel: float, name: str) -> str:
    return f"{sigma_rel}/{name}"


def _snapshots(output: Path) -> dict[int, Path]:
    """In the order of their steps."""
    found = sorted((output / SNAPSHOTS).glob("step-????????.safetensors"))
    numbers = ((path.stem.removeprefix("step-"), path) for path in found)
    return {int(number): path for number, path in numbers if number.isdecimal()}


def _sigma_rels(keys: set[str], path: Path) -> list[float]:
    try:
        found = sorted({float(key.partition("/")[0]) for key in keys})
    except ValueError as error:
        raise ScdError(f"{path}: no snapshot of averages") from error
    if not found or found[0] <= 0:
        raise ScdError(f"{path}: no snapshot of averages")
    return found
