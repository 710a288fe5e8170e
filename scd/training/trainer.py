"""The training loop, for any task, on any number of processes that accelerate was launched with."""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from scd.data.clips import StepSampler, TrainingClips
from scd.errors import ScdError
from scd.models.weights import load_matching
from scd.options import Options, options_to_dict
from scd.training.broken_clips import BrokenClips
from scd.training.checkpoint import (
    TrainingState,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from scd.training.learner import Learner
from scd.training.resume import flat_options, refuse_other_run, run_identity
from scd.training.run_folder import RunLog, write_run_files
from scd.training.sharding import sharded_like, whole_on_cpu
from scd.training.tasks import Task


class Trainer:
    """Trains a task to `options.train.steps` steps, from the newest checkpoint if there is one.

    Results under `options.output`: `checkpoints/`, `samples/`, `log.jsonl`, `loss.png`,
    `options.yml`, `environment.json` and at the end `exported/`.
    """

    def __init__(self, options: Options, task: Task, accelerator: Accelerator):
        self.options = options
        self.task = task
        self.accelerator = accelerator
        self.step = 0
        self.learner = Learner(task.network, task.parameter_groups(), options)
        self.adversary: Learner | None = None
        if task.adversary is not None:
            group = {"params": list(task.adversary.parameters()), "lr": options.optim.adversary_lr}
            self.adversary = Learner(task.adversary, [group], options)
        task.objective.to(accelerator.device)
        state = self._newest_state()
        data = options.data
        self.clips = TrainingClips(
            task.training_data, data.frames, data.frame_stride, options.seed, data.max_broken_clips
        )
        self.broken_clips = BrokenClips(options.output, self.clips, self.step)
        learners = self._learners()
        # Together, because FSDP2 gives the optimisers other parameters.
        optimizers = (learner.optimizer for learner in learners)
        self.objective, *prepared = accelerator.prepare(task.objective, *optimizers)
        # Its decay starts low and rises to `ema_decay`, so that short runs are not held back.
        averaged = averaged_tensors(task.network)
        self.ema = EMAModel(averaged.values(), decay=options.optim.ema_decay)
        if state is not None:
            self.ema.shadow_params = [
                sharded_like(state.ema[name].to(tensor.device), tensor)
                for name, tensor in averaged.items()
            ]
            self.ema.optimization_step = state.step
        saved = () if state is None else (state.optimizer, (state.adversary or {}).get("optimizer"))
        for learner, optimizer, moments in zip_longest(learners, prepared, saved[: len(learners)]):
            learner.start(optimizer, self.step, moments)
        if options.train.compile:
            for part in task.network.children():  # such as encoder and decoder
                part.compile()

    def run(self) -> None:
        options, output = self.options, self.options.output
        if self.accelerator.is_main_process:
            write_run_files(output, options, self.accelerator)
        log = RunLog(output, self.step, enabled=self.accelerator.is_main_process)
        self.accelerator.init_trackers(options.name, config=_for_trackers(options))
        batches = iter(self._loader())
        bar = tqdm(
            total=options.train.steps,
            initial=self.step,
            desc=options.name,
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
            mininterval=1.0,
        )
        while self.step < options.train.steps:
            started = time.perf_counter()
            values = self._train_step(batches)
            bar.update()
            if self.step % options.train.log_every == 0 or self.step == options.train.steps:
                entry = {
                    name: float(self.accelerator.reduce(value.float(), "mean"))
                    for name, value in values.items()
                }
                entry["lr"] = self.learner.schedule.get_last_lr()[0]
                entry["seconds"] = time.perf_counter() - started
                bar.set_postfix(loss=f"{entry['loss']:.4f}")
                log.write({"step": self.step, **entry})
                self.accelerator.log({f"train/{k}": v for k, v in entry.items()}, step=self.step)
            last = self.step == options.train.steps
            if self.step % options.train.save_every == 0 or last:
                self.save()
                log.draw()
            every = options.train.sample_every
            if every and (self.step % every == 0 or last):
                self._validate(log)
        bar.close()
        network = self.averaged_network()
        if self.accelerator.is_main_process:
            self.task.export(network, output / "exported")
        self.accelerator.end_training()

    def save(self) -> Path | None:
        """Write a checkpoint (main process only)."""
        self.accelerator.wait_for_everyone()
        state = TrainingState(
            self.step,
            run_identity(self.options, self.accelerator.num_processes),
            model=whole_on_cpu(self.task.network.state_dict()),
            ema=self._averaged_state(),
            optimizer=whole_on_cpu(self.learner.optimizer.state_dict()),
        )
        if self.adversary is not None:
            state.adversary = {
                "model": whole_on_cpu(self.adversary.network.state_dict()),
                "optimizer": whole_on_cpu(self.adversary.optimizer.state_dict()),
            }
        if not self.accelerator.is_main_process:
            return None
        folder = self.options.output / "checkpoints"
        return save_checkpoint(folder, state, self.options.train.keep_checkpoints)

    def averaged_network(self) -> nn.Module:
        """A copy of the network with its averaged weights, whole on every process."""
        network = self.task.network
        copy = type(network).from_config(network.config)  # type: ignore[attr-defined]
        copy.load_state_dict(self._averaged_state())
        return copy.to(self.accelerator.device).eval()

    def _averaged_state(self) -> dict[str, Tensor]:
        network = self.task.network
        averages = zip(averaged_tensors(network), self.ema.shadow_params, strict=True)
        return whole_on_cpu({**network.state_dict(), **dict(averages)})

    def _learners(self) -> list[Learner]:
        return [self.learner] if self.adversary is None else [self.learner, self.adversary]

    def _train_step(self, batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
        """One optimiser step, of an adversary too, over `gradient_accumulation` batches."""
        accumulation = self.options.train.gradient_accumulation
        totals: dict[str, Tensor] = {}
        for micro_step in range(accumulation):
            batch = self.broken_clips.taken_from(next(batches), self.step + 1)
            batch = {k: v.to(self.accelerator.device) for k, v in batch.items()}
            # DDP reduces gradients once a step, with the last batch.
            last = micro_step == accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(self.objective):
                values = self.objective(batch)
                self.accelerator.backward(values["loss"] / accumulation)
            for name, value in values.items():
                totals[name] = totals.get(name, 0) + value.detach() / accumulation
        norms = [learner.clip(self.accelerator) for learner in self._learners()]
        totals |= zip(("grad_norm", "adversary_grad_norm"), norms, strict=False)
        if not all(math.isfinite(float(norm)) for norm in norms):
            raise ScdError(
                f"step {self.step + 1}: the loss or its gradient is not finite (loss "
                f"{float(totals['loss'])}); lower optim.lr or look at the data, then run again: "
                f"the newest checkpoint is whole"
            )
        for learner in self._learners():
            learner.step()
        self.ema.step(averaged_tensors(self.task.network).values())
        self.step += 1
        return totals

    def _validate(self, log: RunLog) -> None:
        folder = self.options.output / f"samples/step-{self.step:08d}"
        metrics = self.task.validate(self.averaged_network(), folder)
        log.write({"step": self.step, "validation": metrics})
        self.accelerator.log({f"val/{k}": v for k, v in metrics.items()}, step=self.step)
        self.accelerator.wait_for_everyone()

    def _loader(self) -> DataLoader:
        t = self.options.train
        sampler = StepSampler(
            t.batch_size,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.step * t.gradient_accumulation,
            t.steps * t.gradient_accumulation,
        )
        return DataLoader(
            self.clips,
            batch_sampler=sampler,
            num_workers=t.workers,
            pin_memory=self.accelerator.device.type == "cuda",
            prefetch_factor=4 if t.workers else None,
        )

    def _newest_state(self) -> TrainingState | None:
        """The newest checkpoint, its weights loaded into the networks."""
        path = latest_checkpoint(self.options.output / "checkpoints")
        if path is None:
            return None
        state = load_checkpoint(path)
        now = run_identity(self.options, self.accelerator.num_processes)
        refuse_other_run(state.run, now, str(path))
        load_matching(self.task.network, state.ema, str(path))  # for now, to see that it fits
        load_matching(self.task.network, state.model, str(path))
        if self.adversary is not None:
            assert state.adversary is not None  # the run is the same, so it had one
            load_matching(self.adversary.network, state.adversary["model"], f"{path} (adversary)")
        self.step = state.step
        if self.accelerator.is_main_process:
            print(f"continuing {self.options.name} from step {self.step} ({path})")
        return state


def make_accelerator(options: Options) -> Accelerator:
    """The processes and devices of this run, as `accelerate launch` set them up."""
    return Accelerator(
        mixed_precision=options.train.mixed_precision,
        log_with=list(options.train.trackers) or None,
        project_config=ProjectConfiguration(str(options.output), str(options.output / "trackers")),
        cpu=not torch.cuda.is_available(),
        # The others wait while the main process validates, which takes longer than the default.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
    )


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


def _for_trackers(options: Options) -> dict[str, str | int | float | bool]:
    """Options as the trackers want them: dotted names and plain values."""
    flat = flat_options(options_to_dict(options))
    return {k: v if isinstance(v, int | float | bool) else str(v) for k, v in flat.items()}
