"""Train any task, on any number of processes that accelerate was launched with."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch import Tensor, nn

from scd.data.loader import TrainingClips, training_batches
from scd.errors import ScdError, Stopped
from scd.options import Options
from scd.training.checkpoint import CheckpointWriter, TrainingState, saves_in_background
from scd.training.ema import EMA, PostHocEMA, set_newer_snapshots_aside
from scd.training.faults import (
    BadSteps,
    BrokenClips,
    RunningStatistics,
    any_process,
    is_bad_step,
    refuse_unequal_weights,
)
from scd.training.optimizer import OptimizedModel
from scd.training.resume import describe_clips, resume, run_identity
from scd.training.run_log import RunLog, StepReporter, record_setup, start_trackers
from scd.training.tasks import Task
from scd.training.watchdog import Heartbeat
from scd.utils.files import write_folder_atomically
from scd.utils.processes import all_have_bf16
from scd.utils.signals import StopRequest, stop_request
from scd.utils.tracking import log_pictures


class StepResult(NamedTuple):
    """The outcome of a training step. The flags are the same on every process."""

    values: dict[str, Tensor]  # to log: this process's loss and its parts, gradient norms
    applied: bool  # False: the step was bad
    stop: bool  # a process was asked to stop


class Trainer:
    """Trains a task to `options.train.steps` steps, from the newest checkpoint if there is one.

    Results under `options.output`: `checkpoints/`, `samples/`, `snapshots/`, `log.jsonl`,
    `loss.png`, `options.yml`, `environment.json`, `heartbeat.json`, where steps could not be
    applied `bad-steps.jsonl`, and at the end `exported/`.

    Raises:
        ScdError: no checkpoint is whole, or the newest belongs to another run.
    """

    def __init__(self, options: Options, task: Task, accelerator: Accelerator):
        self.options = options
        self.task = task
        self.accelerator = accelerator
        self.main = accelerator.is_main_process
        self.precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
        self.identity = run_identity(options, accelerator.num_processes)
        self.identity |= {
            "precision": self.precision,
            "clips": describe_clips(task.training_data),
        }
        state = resume(options, task, self.identity, self.main)
        self.step = self.saved_step = state.step if state else 0

        bf16 = all_have_bf16(accelerator.device)
        self.model = OptimizedModel(task.network, task.parameter_groups(), options, bf16)
        self.critic: OptimizedModel | None = None
        if task.critic is not None:
            self.critic = OptimizedModel(task.critic, task.critic_groups(), options, bf16)
        self.models = [model for model in (self.model, self.critic) if model is not None]
        # Together, because FSDP2 gives the optimizers other parameters.
        self.objective, *optimizers = accelerator.prepare(
            task.objective.to(accelerator.device), *(model.optimizer for model in self.models)
        )
        saved: list[dict[str, Any] | None] = [None, None]
        if state is not None:
            saved = [state.optimizer, (state.critic or {}).get("optimizer")]
        for model, optimizer, moments in zip(self.models, optimizers, saved, strict=False):
            model.start(optimizer, self.step, moments)
        self.ema = EMA(task.network, options.optim.ema_decay, state.ema if state else None)
        task.on_average_changed(self.ema.mean.average)
        self.posthoc_ema = PostHocEMA(task.network, options, state.averages if state else {})
        if options.train.compile:
            _compile_parts(task.network)

        output, data = options.output, options.data
        self.clips = TrainingClips(
            task.training_data, data.frames, data.frame_stride, options.seed, data.max_broken_clips
        )
        if self.main:
            set_newer_snapshots_aside(output, self.step)
        self.checkpoints = CheckpointWriter(
            output / "checkpoints",
            options.train.keep_checkpoints,
            self.main,
            saves_in_background(accelerator.device),
        )
        self.heartbeat = Heartbeat(output, self.main)
        self.log = RunLog(output / "log.jsonl", self.step, self.main)
        bad_log = RunLog(output / "bad-steps.jsonl", self.step, self.main)
        self.bad_steps = BadSteps(bad_log, self.clips, state.bad_steps if state else 0)
        self.broken_clips = BrokenClips(output, self.clips, self.step)
        self.statistics = RunningStatistics([model.network for model in self.models])

    def run(self) -> None:
        """Train to the last step, then export the averaged weights.

        Raises:
            Stopped: a signal asked for it; the state is saved.
            ScdError: too many steps in a row could not be applied, processes hold different
                weights, or a file cannot be read or written.
        """
        options, t = self.options, self.options.train
        if self.main:
            record_setup(
                options,
                self.accelerator,
                self.precision,
                len(self.task.training_data),
                self.log,
                self.step,
            )
        start_trackers(options, self.accelerator, self.step)
        cost = self.task.clip_cost() if self.main else None
        reporter = StepReporter(
            options, self.accelerator, self.precision, self.log, cost, self.step
        )
        loader = training_batches(self.step, self.clips, t, self.accelerator)
        with reporter, stop_request() as request, loader as batches, self.checkpoints:
            batches = reporter.meter.time_waiting(batches)
            self._validate()
            recent: dict[str, Tensor] = {}  # since the last log; some values come in few steps
            while self.step < t.steps:
                self.heartbeat.beat("training", self.step)
                lr = self.model.lr
                with reporter.step(self.step + 1):
                    values, applied, stop = self._train_step(batches, request)
                recent |= values
                if self._is_due(t.log_every):
                    reporter.log_step(self.step, recent, lr, applied)
                    recent = {}
                if self.bad_steps.in_a_row >= t.max_bad_steps:
                    self._give_up()
                if t.check_weights_every and self.step % t.check_weights_every == 0:
                    refuse_unequal_weights([model.network for model in self.models], self.step)
                # Before the checkpoint: what comes after it is not repeated by a resumed run.
                if self._is_due(t.snapshot_every):
                    self.heartbeat.beat("saving", self.step)
                    self.posthoc_ema.write_snapshot(self.step)
                if self._is_due(t.save_every) or stop:
                    self._save(self.step, self.bad_steps.in_a_row)
                    if self.step < t.steps:  # the last plot comes with the export
                        self.log.draw()
                if stop:
                    self._stop(request)
                self._validate()
            self.checkpoints.finish()
        self._export()

    def _train_step(self, batches: Iterator[dict[str, Tensor]], request: StopRequest) -> StepResult:
        """Take one optimizer step, of a critic too, over `gradient_accumulation` batches."""
        trains_network = self.task.trains_network(self.step + 1)
        accumulation = self.options.train.gradient_accumulation
        totals: dict[str, Tensor] = {}
        seen: list[tuple[Tensor, Tensor]] = []  # sample numbers and loss of each batch
        self.statistics.save()
        for micro_step in range(accumulation):
            batch = self.broken_clips.pop_from(next(batches))
            samples = batch.pop("sample")
            tensors = {
                k: v.to(self.accelerator.device, non_blocking=True) for k, v in batch.items()
            }
            # Sample numbers stay on the host: to read them from the device would wait for it.
            numbers = {"sample": samples.tolist(), "step": self.step + 1}
            ready = self.task.prepare({**tensors, **numbers})
            # DDP reduces gradients once a step, with the last batch.
            last = micro_step == accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(self.objective):
                values = self.objective(ready)
                self.accelerator.backward(values["loss"] / accumulation)
            for name, value in values.items():
                totals[name] = totals.get(name, 0) + value.detach() / accumulation
            seen.append((samples, values["loss"].detach()))

        norms = [model.clip_gradient(self.accelerator) for model in self.models]
        named = dict(zip(("grad_norm", "critic_grad_norm"), norms, strict=False))
        totals |= named
        bad, stop, save_failed, skipped = any_process(
            self.accelerator,
            is_bad_step(totals["loss"], norms, self.options.optim.skip_grad_norm),
            request.signal is not None,
            self.checkpoints.failed,
            bool(self.broken_clips.skipped),
        )
        if save_failed:
            self.checkpoints.finish()  # which raises
        if skipped:
            self.broken_clips.count(self.step + 1)
        for model in self.models:
            model.step(apply=not bad and (trains_network or model is not self.model))
        self.step += 1
        if bad:
            self.statistics.restore()
            self.bad_steps.record(self.step, seen, named)
        else:
            if trains_network:
                self.ema.update(self.step)
                self.task.on_average_changed(self.ema.mean.average)
            self.posthoc_ema.update(self.step)
            self.bad_steps.in_a_row = 0
        return StepResult(totals, not bad, stop)

    def _is_due(self, every: int) -> bool:
        """Check whether an action is due: every `every` steps (0: never), and at the last one."""
        return bool(every) and (self.step % every == 0 or self.step == self.options.train.steps)

    def _validate(self) -> None:
        """Validate the averaged weights, by held-out loss and by samples, where that is due."""
        t = self.options.train
        loss_due = self._is_due_and_not_logged(t.val_loss_every, "val_loss")
        samples_due = self._is_due_and_not_logged(t.sample_every, "validation")
        if not loss_due and not samples_due:
            return
        self.heartbeat.beat("validating", self.step)
        network: Any = self.ema.as_network().to(self.accelerator.device)
        if loss_due:
            assert self.task.held_out is not None
            losses = self.task.held_out(network, self.precision)
            self.log.write({"step": self.step, **{f"val_{k}": v for k, v in losses.items()}})
            self.accelerator.log({f"val/{k}": v for k, v in losses.items()}, step=self.step)
        if samples_due:
            folder = self.options.output / f"samples/step-{self.step:08d}"
            metrics = self.task.validate(network, folder)
            self.log.write({"step": self.step, "validation": metrics})
            self.accelerator.log({f"val/{k}": v for k, v in metrics.items()}, step=self.step)
            if self.main:
                log_pictures(self.accelerator.trackers, folder, self.task.pictures, self.step)
        self.accelerator.wait_for_everyone()

    def _is_due_and_not_logged(self, every: int, key: str) -> bool:
        """Check whether a validation is due; collective.

        A resumed run may owe one: it was killed between a checkpoint and its validation.
        """
        if self.step == 0 or not self._is_due(every):
            return False
        return any_process(self.accelerator, self.main and not self.log.has(key, self.step))[0]

    def _save(self, step: int, bad_steps: int) -> None:
        """Write a checkpoint of `step`, once the last one is on disk; see `CheckpointWriter`."""
        self.heartbeat.beat("saving", self.step)
        self.checkpoints.finish()
        keep = self.main
        state = TrainingState(
            step,
            self.identity,
            **self.model.state(keep),
            ema=self.ema.state(keep),
            averages=self.posthoc_ema.state(keep),
            critic=self.critic.state(keep) if self.critic else None,
            bad_steps=bad_steps,
        )
        self.checkpoints.write(state)
        self.saved_step = step

    def _stop(self, request: StopRequest) -> None:
        """Leave in order: the state of this step is being saved."""
        self.checkpoints.finish()
        self.accelerator.end_training()
        cause = request.signal.name if request.signal else "a signal to another process"
        raise Stopped(
            f"{self.options.output}: stopped by {cause}, saved at step {self.step} of "
            f"{self.options.train.steps}; run the same command to resume"
        )

    def _give_up(self) -> None:
        """Save the last good state, unless it is saved already, and raise the reason."""
        in_a_row = self.bad_steps.in_a_row
        good = self.step - in_a_row
        if good > self.saved_step:
            self._save(good, bad_steps=0)
        self.checkpoints.finish()
        rates = "optim.lr" if self.critic is None else "optim.lr or the critic's rate"
        kept = f"the weights of step {good} are saved" if good else "no weights were changed"
        raise ScdError(
            f"step {self.step}: {in_a_row} steps in a row could not be applied, the last with "
            f"{self.bad_steps.report} (all in {self.bad_steps.log.path}); {kept}; lower {rates} "
            f"or look at these clips, then run again"
        )

    def _export(self) -> None:
        """Export the averaged weights, and end the trackers."""
        self.heartbeat.beat("exporting", self.step)
        self.log.draw()  # with the last entries, even after a kill between checkpoint and plot
        network = self.ema.as_network()
        if self.main:
            write_folder_atomically(
                self.options.output / "exported", lambda aside: self.task.export(network, aside)
            )
        self.accelerator.end_training()


def _compile_parts(network: nn.Module) -> None:
    """Compile encoder and decoder, or the blocks of a list, whose own forward nothing calls."""
    for part in network.children():
        for module in part if isinstance(part, nn.ModuleList) else [part]:
            module.compile()
