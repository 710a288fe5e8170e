"""The training loop, for any task, on any number of processes that accelerate was launched with."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import zip_longest
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from scd.data.loader import TrainingClips, training_batches
from scd.errors import ScdError, Stopped
from scd.models.weights import load_matching
from scd.options import Options
from scd.training.checkpoint import (
    CheckpointWriter,
    TrainingState,
    load_checkpoint,
    saves_in_background,
    set_aside_newer,
)
from scd.training.ema import EMA, PostHocEMA, set_aside_newer_snapshots
from scd.training.faults import (
    BadSteps,
    BrokenClips,
    RunningStatistics,
    agree,
    is_bad,
    refuse_unequal_weights,
)
from scd.training.optimizer import OptimizedModel
from scd.training.resume import (
    newest_checkpoint,
    precision_before,
    refuse_other_run,
    run_identity,
)
from scd.training.run_log import Meter, RunLog, StepTrace, for_trackers, peak_flops, write_run_files
from scd.training.sharding import whole_on_cpu
from scd.training.tasks import Task
from scd.training.watchdog import Heartbeat, StopRequest, stop_request
from scd.utils.files import write_folder_atomically
from scd.utils.processes import all_have_bf16, error_barrier
from scd.utils.tracking import log_pictures


class Trainer:
    """Trains a task to `options.train.steps` steps, from the newest checkpoint if there is one.

    Results under `options.output`: `checkpoints/`, `samples/`, `snapshots/`, `log.jsonl`,
    `loss.png`, `options.yml`, `environment.json`, `heartbeat.json`, where steps could not be
    applied `bad-steps.jsonl`, and at the end `exported/`.

    Raises:
        ScdError: see `_newest_state`.
    """

    def __init__(self, options: Options, task: Task, accelerator: Accelerator):
        self.options = options
        self.task = task
        self.accelerator = accelerator
        self.main = accelerator.is_main_process
        self.precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
        self.step = 0
        self.saved_step = 0
        bf16 = all_have_bf16(accelerator.device)
        self.learner = OptimizedModel(task.network, task.parameter_groups(), options, bf16)
        self.adversary: OptimizedModel | None = None
        if task.adversary is not None:
            group = {"params": list(task.adversary.parameters()), "lr": options.optim.adversary_lr}
            self.adversary = OptimizedModel(task.adversary, [group], options, bf16)
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
        mean = None if state is None else state.ema
        self.average = EMA(task.network, options.optim.ema_decay, mean)
        saved_averages = {} if state is None else state.averages
        self.averages = PostHocEMA(task.network, options, saved_averages)
        if self.main:
            set_aside_newer_snapshots(options.output, self.step)
        saved = () if state is None else (state.optimizer, (state.adversary or {}).get("optimizer"))
        for learner, optimizer, moments in zip_longest(learners, prepared, saved[: len(learners)]):
            learner.start(optimizer, self.step, moments)
        output = options.output
        self.heartbeat = Heartbeat(output, self.main)
        self.checkpoints = CheckpointWriter(
            output / "checkpoints",
            options.train.keep_checkpoints,
            self.main,
            saves_in_background(accelerator.device),
        )
        self.log = RunLog(output / "log.jsonl", self.step, self.main)
        bad_log = RunLog(output / "bad-steps.jsonl", self.step, self.main)
        self.bad_steps = BadSteps(bad_log, self.clips, state.bad_steps if state else 0)
        self.statistics = RunningStatistics([learner.network for learner in learners])
        if options.train.compile:
            for part in task.network.children():  # encoder and decoder, or a list of blocks
                for module in part if isinstance(part, nn.ModuleList) else [part]:
                    module.compile()

    def run(self) -> None:
        """Train to the end.

        Raises:
            Stopped: a signal asked for it; the state is saved.
            ScdError: too many steps in a row could not be applied, processes hold different
                weights, or a file cannot be read or written.
        """
        options, t = self.options, self.options.train
        if self.main:
            used = write_run_files(options.output, options, self.accelerator, self.precision)
            self.log.write_where_it_changed({"step": self.step, **used})
            print(f"{options.name}: training in {used['precision']} on {used['device']}")
        with error_barrier():
            # TensorBoard leaves out what a killed run had logged beyond the checkpoint.
            kept = {"tensorboard": {"purge_step": self.step + 1}}
            self.accelerator.init_trackers(options.name, for_trackers(options), kept)
        processes = self.accelerator.num_processes
        meter = Meter(
            run_identity(options, processes)["clips_per_step"],
            processes,
            self.task.clip_cost() if self.main else None,
            peak_flops(self.accelerator.device, self.precision),
        )
        trace = StepTrace(options.output, t.profile_steps, self.main)
        bar = tqdm(
            total=t.steps,
            initial=self.step,
            desc=options.name,
            disable=not self.main,
            dynamic_ncols=True,
            mininterval=1.0,
        )
        to_come = training_batches(self.step, self.clips, t, self.accelerator)
        with bar, stop_request() as request, to_come as batches, trace, self.checkpoints:
            self._validate()
            while self.step < t.steps:
                self.heartbeat.beat("training", self.step)
                with trace.step(self.step + 1):
                    values, bad, stop = self._train_step(batches, meter, request)
                bar.update()
                last = self.step == t.steps
                if self.step % t.log_every == 0 or last:
                    self._write_log(values, bad, meter, bar)
                if self.bad_steps.in_a_row >= t.max_bad_steps:
                    self._give_up()
                if t.check_weights_every and self.step % t.check_weights_every == 0:
                    refuse_unequal_weights(self.task.network, self.step)
                # Before the checkpoint, behind which nothing is done again.
                if t.snapshot_every and (self.step % t.snapshot_every == 0 or last):
                    self.heartbeat.beat("saving", self.step)
                    self.averages.write_snapshot(self.step)
                if self.step % t.save_every == 0 or last or stop:
                    self.save()
                    if not last:
                        self.log.draw()
                if stop:
                    self.checkpoints.finish()
                    self.accelerator.end_training()
                    told = request.signal.name if request.signal else "a signal to another process"
                    raise Stopped(
                        f"{options.output}: stopped by {told}, saved at step {self.step} of "
                        f"{t.steps}; started again, it goes on"
                    )
                self._validate()
            self.checkpoints.finish()
        self.heartbeat.beat("exporting", self.step)
        self.log.draw()  # with the last entries, even if a kill came between save and picture
        network = self.average.as_network()
        if self.main:
            write_folder_atomically(
                options.output / "exported", lambda aside: self.task.export(network, aside)
            )
        self.accelerator.end_training()

    def save(self) -> None:
        """Begin to write a checkpoint (see `CheckpointWriter`), once the one before is there."""
        self._save_step(self.step, self.bad_steps.in_a_row)

    def _save_step(self, step: int, bad_steps: int) -> None:
        self.heartbeat.beat("saving", self.step)
        self.checkpoints.finish()
        self.checkpoints.write(replace(self._state(), step=step, bad_steps=bad_steps))
        self.saved_step = step

    def _state(self) -> TrainingState:
        """Gather what a checkpoint holds, on the main process alone; collective."""
        keep = self.main
        state = TrainingState(
            self.step,
            run_identity(self.options, self.accelerator.num_processes)
            | {"precision": self.precision},
            model=whole_on_cpu(self.task.network.state_dict(), keep),
            ema=self.average.state(keep),
            optimizer=whole_on_cpu(self.learner.optimizer.state_dict(), keep),
            averages=self.averages.state(keep),
        )
        if self.adversary is not None:
            state.adversary = {
                "model": whole_on_cpu(self.adversary.network.state_dict(), keep),
                "optimizer": whole_on_cpu(self.adversary.optimizer.state_dict(), keep),
            }
        return state

    def _give_up(self) -> None:
        """Save the last good state, unless it is saved already, and tell why the run ends."""
        in_a_row = self.bad_steps.in_a_row
        good = self.step - in_a_row
        if good > self.saved_step:
            self._save_step(good, bad_steps=0)
        self.checkpoints.finish()
        kept = f"the weights of step {good} are saved" if good else "no weights were changed"
        raise ScdError(
            f"step {self.step}: {in_a_row} steps in a row could not be applied, the last with "
            f"{self.bad_steps.report} (all in {self.bad_steps.log.path}); {kept}; lower optim.lr "
            f"or look at these clips, then run again"
        )

    def _learners(self) -> list[OptimizedModel]:
        return [self.learner] if self.adversary is None else [self.learner, self.adversary]

    def _train_step(
        self, batches: Iterator[dict[str, Tensor]], meter: Meter, request: StopRequest
    ) -> tuple[dict[str, Tensor], bool, bool]:
        """One optimiser step, of an adversary too, over `gradient_accumulation` batches.

        Returns:
            What to log; whether the step was bad, and so not applied; whether to stop. The last
            two are the same on every process.
        """
        began = time.perf_counter()
        accumulation = self.options.train.gradient_accumulation
        totals: dict[str, Tensor] = {}
        seen: list[tuple[Tensor, Tensor]] = []
        self.statistics.keep()
        for micro_step in range(accumulation):
            batch = self.broken_clips.taken_from(meter.next_batch(batches), self.step + 1)
            samples = batch.pop("sample")
            batch = self.task.prepare(
                {k: v.to(self.accelerator.device, non_blocking=True) for k, v in batch.items()}
            )
            # DDP reduces gradients once a step, with the last batch.
            last = micro_step == accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(self.objective):
                # Numbers stay off the device, where reading them would wait for it.
                values = self.objective({**batch, "sample": samples.tolist()})
                self.accelerator.backward(values["loss"] / accumulation)
            for name, value in values.items():
                totals[name] = totals.get(name, 0) + value.detach() / accumulation
            seen.append((samples, values["loss"].detach()))
        norms = [learner.clip(self.accelerator) for learner in self._learners()]
        totals |= zip(("grad_norm", "adversary_grad_norm"), norms, strict=False)
        judged = is_bad(totals["loss"], norms, self.options.optim.skip_grad_norm)
        asked = request.signal is not None
        bad, stop, unsaved = agree(self.accelerator, judged, asked, self.checkpoints.failed)
        if unsaved:
            self.checkpoints.finish()  # which raises
        for learner in self._learners():
            learner.step(apply=not bad)
        self.step += 1
        if bad:
            self.statistics.restore()
            self.bad_steps.add(self.step, seen, norms[0])
        else:
            self.average.add(self.step)
            self.averages.add(self.step)
            self.bad_steps.in_a_row = 0
        meter.add_step(time.perf_counter() - began)
        return totals, bad, stop

    def _write_log(self, values: dict[str, Tensor], bad: bool, meter: Meter, bar: tqdm) -> None:
        entry = {
            name: float(self.accelerator.reduce(value.float(), "mean"))
            for name, value in values.items()
        }
        entry["lr"] = float(self.learner.schedule.get_last_lr()[0])
        entry |= meter.entry(self.accelerator.device)
        bar.set_postfix(loss=f"{entry['loss']:.4f}")
        self.log.write({"step": self.step, **entry, **({"applied": False} if bad else {})})
        self.accelerator.log({f"train/{k}": v for k, v in entry.items()}, step=self.step)

    def _is_due(self, every: int, key: str) -> bool:
        """Whether what is done every so many steps, and at the end, is due and not in the log yet.

        In a run that goes on it may be: killed between a checkpoint and what was due at its step.
        """
        at_end = self.step == self.options.train.steps
        if not every or not self.step or (self.step % every and not at_end):
            return False
        return agree(self.accelerator, self.main and not self.log.has(key, self.step))[0]

    def _validate(self) -> None:
        """Measure the mean of the weights in the ways that are due."""
        t = self.options.train
        loss_due = self._is_due(t.val_loss_every, "val_loss")
        samples_due = self._is_due(t.sample_every, "validation")
        if not loss_due and not samples_due:
            return
        self.heartbeat.beat("validating", self.step)
        network: Any = self.average.as_network().to(self.accelerator.device)
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

    def _newest_state(self) -> TrainingState | None:
        """The newest checkpoint, its weights loaded into the networks.

        Raises:
            ScdError: no checkpoint is whole, or the newest belongs to another experiment.
        """
        path = newest_checkpoint(self.options.output / "checkpoints", self.main)
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
        self.step = self.saved_step = state.step
        if self.main:
            set_aside_newer(path)
            print(f"continuing {self.options.name} from step {self.step} ({path})")
            before = precision_before(state.run)
            if before not in (None, self.precision):
                print(f"it was trained in {before} so far, and goes on in {self.precision}")
        return state
