"""The mean of a network's weights over the steps (EMA)."""

from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from scd.training.sharding import sharded_like, whole_on_cpu


class Average:
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
