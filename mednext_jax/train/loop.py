"""The training loop: ``fit(config, data, workdir)``. The same workdir goes on where it stopped, bit for bit."""

import dataclasses
import math
import time
from collections import deque
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mednext_jax import peft
from mednext_jax.train import artefacts, devices, experiment, preemption, validation, workdir
from mednext_jax.train.beginning import Beginning, begin
from mednext_jax.train.checkpoints import Checkpoints
from mednext_jax.train.feed import Feed
from mednext_jax.train.logging import VALIDATION, RunLog
from mednext_jax.train.schedules import Plateau, make_schedule
from mednext_jax.train.step import TrainState, compile_step, evaluated, state_shardings

STEPS_IN_FLIGHT = 2  # dispatched ahead: the device never waits, and inputs and messages stay few
CHECKPOINTS = "checkpoints"
RESULT_FILE = "result.json"


class Diverged(ValueError):
    """Loss or gradients were not finite more often than the config allows."""


def fit(config: Any, data: experiment.Data, folder: str | Path) -> dict[str, Any]:
    """Trains as ``config`` says, or goes on with the run that ``folder`` holds.

    Args:
      config: ``ConfigDict`` or mapping with the fields of ``configs/default.py``.
      data: what to train and validate on.
      folder: the workdir.

    Returns: ``{"step", "best_step", "best_score", "scores", "cost"}``, also written to ``result.json``; the
      scores are the last validation's.

    Raises:
      ValueError, OSError: one line for the user: config, data, files or numbers that do not fit.
      preemption.Interrupted: asked to stop; the state was saved.
    """
    config, folder = workdir.plain(config), Path(folder)
    experiment.check_config(config)
    if config["deterministic"]:
        devices.check_deterministic()
    validation.check_score(config["eval"]["score"], data.contract.regions)
    mesh = devices.make_mesh(config["n_devices"])
    devices.check_batch_size(config["data"]["batch_size"], config["optim"]["accumulate"], mesh)
    lock = workdir.Lock(folder) if jax.process_index() == 0 else None
    try:
        checkpoints = Checkpoints(folder / CHECKPOINTS)
        workdir.check_shared(folder)
        try:
            with preemption.StopRequests() as stop:
                run = Run(config, data, folder, checkpoints, mesh, begin(config, data, folder, checkpoints, mesh))
                try:
                    return run.to_the_end(stop)
                finally:
                    run.log.close()
        finally:
            checkpoints.close()
    finally:
        if lock is not None:
            lock.release()


class Run:
    """A run in progress: the state on the devices and everything that acts on it."""

    def __init__(
        self,
        config: dict[str, Any],
        data: experiment.Data,
        folder: Path,
        checkpoints: Checkpoints,
        mesh: jax.sharding.Mesh,
        beginning: Beginning,
    ):
        self.config, self.data, self.folder, self.checkpoints, self.mesh = config, data, folder, checkpoints, mesh
        self.parts, state, self.progress, report = beginning
        self.step, self.bad_steps = int(state.step), int(state.bad_steps)
        self.saved_step = self.step
        self.total_steps = config["optim"]["total_steps"]
        self.schedule = make_schedule(config["optim"])
        self.plateau = Plateau(config["optim"]["plateau_factor"], config["optim"]["plateau_patience"])
        if self.progress.plateau:
            self.plateau.set_state(self.progress.plateau)
        self.primary = jax.process_index() == 0
        self.log = RunLog(folder, self.step, self.progress.written(self.step), self.total_steps, self.primary)
        for line in (*report, peft.summary(self.parts.parameters(self.parts.trainable), self.parts.method.rule)):
            self.log.say(line)
        self.shard_optimizer = config["optim"]["shard_state"]
        shardings = state_shardings(mesh, state, self.shard_optimizer)
        self.state: TrainState = devices.place(state, shardings)
        self.frozen = devices.replicate(mesh, self.parts.frozen)
        self.feed = Feed(data.stream, mesh)
        self.position = data.stream.get_state()
        self.running: deque[jax.Array] = deque()  # the loss of each step that may still be at work
        self.unread: list[tuple[int, list[str], dict[str, Any]]] = []  # metrics still on the device
        self.temporary_bytes: int | None = None

    def to_the_end(self, stop: preemption.StopRequests) -> dict[str, Any]:
        """Steps, log lines, validations and checkpoints until the last step or early stopping."""
        try:
            if self.step < self.total_steps:
                with stop.ending_the_wait():
                    self.feed.prefetch()  # unreadable data ends the run before a minute of compilation
                self.compiled = self.compile()
            if self.validation_due():  # an interrupted run may owe one
                self.validate(stop)
            while self.step < self.total_steps and not self.out_of_patience():
                if number := stop.requested(self.step):
                    self.save()
                    self.checkpoints.wait()
                    raise preemption.Interrupted(number, self.step, self.folder)
                self.advance(stop)
                if self.step % self.config["log_every"] == 0:
                    self.write_metrics()
                if self.validation_due():
                    self.validate(stop)
                if self.checkpoint_due():
                    self.save()
        except preemption.Stopped:
            self.save()
            self.checkpoints.wait()
            raise preemption.Interrupted(stop.signal_number, self.step, self.folder) from None
        return self.finish()

    def compile(self) -> Any:
        """The compiled step; says how long it took and what it holds."""
        self.log.say("compiling the training step (up to a minute or two on a CPU, seconds if it was before)")
        started, batch = time.monotonic(), experiment.batch_shapes(self.config, len(self.data.contract.channels))
        compiled = compile_step(self.parts.step, self.mesh, self.state, self.frozen, batch, self.shard_optimizer)
        devices.meet("compiled")
        self.temporary_bytes = getattr(compiled.memory_analysis(), "temp_size_in_bytes", None)
        self.log.say(
            f"compiled in {time.monotonic() - started:.1f} s for {self.mesh.devices.size} "
            f"{jax.devices()[0].device_kind} device(s): {(self.temporary_bytes or math.nan) / 2**20:.4g} MiB of "
            "temporaries per device"
        )
        return compiled

    def advance(self, stop: preemption.StopRequests) -> None:
        """Dispatches one step and reads the next batch while it runs.

        Nothing but batches and learning rates goes to the devices here, and nothing comes back.
        """
        with jax.transfer_guard("disallow"):
            with stop.ending_the_wait():
                fed = self.feed.take()
            rate = self.schedule(self.step) * self.plateau.scale
            learning_rate = devices.replicate(self.mesh, np.float32(rate))
            self.state, metrics = self.compiled(self.state, self.frozen, fed.arrays, learning_rate)
            self.step, self.position = self.step + 1, fed.position
            self.running.append(metrics["loss"])
            self.unread.append((self.step, fed.case_ids, {**metrics, "learning_rate": rate}))
            if self.step < self.total_steps:
                with stop.ending_the_wait():
                    self.feed.prefetch()
            self.wait(STEPS_IN_FLIGHT)

    def wait(self, left: int = 0) -> None:
        """Until all steps but the ``left`` newest are done."""
        while len(self.running) > left:
            self.running.popleft().block_until_ready()
            self.log.tick()

    def collect(self) -> None:
        """Fetches the metrics of all steps since the last time.

        Raises: Diverged if more than ``max_bad_steps`` were not finite.
        """
        self.wait()
        unread, self.unread = self.unread, []
        fetched = jax.device_get([metrics for _, _, metrics in unread])
        for (step, case_ids, _), metrics in zip(unread, fetched, strict=True):
            values = {name: float(value) for name, value in metrics.items()}
            if not values.pop("bad"):
                self.progress.window.append(values)
                continue
            self.bad_steps += 1
            limit = self.config["max_bad_steps"]
            what = f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']} with {', '.join(case_ids)}"
            self.log.record(step, {"skipped": 1, "cases": case_ids})
            self.log.say(f"skipped {what}")
            if self.bad_steps > limit:
                raise Diverged(
                    f"{what}; {self.bad_steps} bad step(s), config.max_bad_steps allows {limit}: look at these cases, "
                    f"lower config.optim.peak_lr or allow more; what {self.folder} holds is from before"
                )

    def write_metrics(self) -> None:
        """One line of means since the last one."""
        self.collect()
        window, self.progress.window = self.progress.window, []
        if window:
            means = {
                name: sum(values[name] for values in window) / len(window) for name in ("loss", "grad_norm")
            }
            metrics = {**means, "learning_rate": window[-1]["learning_rate"], "skipped_steps": self.bad_steps}
            self.log.record(self.step, metrics)
            self.log.progress(self.step, metrics)

    def validation_due(self) -> bool:
        """Whether this step is to be validated and was not."""
        every = self.config["eval"]["every"]
        if not every or not self.data.validation or self.step in (0, self.progress.validated_step):
            return False
        return self.step % every == 0 or self.step == self.total_steps

    def checkpoint_due(self) -> bool:
        """Whether this step is to be saved; a validated one always is, for it may be the best."""
        validated = self.step == self.progress.validated_step
        return validated or self.step % self.config["checkpoint_every"] == 0

    def out_of_patience(self) -> bool:
        """Early stopping: no better validation for ``eval.patience`` of them (0: never)."""
        return 0 < self.config["eval"]["patience"] <= self.progress.stale

    def validate(self, stop: preemption.StopRequests) -> None:
        """Scores whole cases, keeps the best network, feeds the plateau rule."""
        self.collect()
        trainable = evaluated(self.state)
        scores = validation.validate(
            self.parts.window,
            self.parts.parameters(trainable),
            self.data.validation,
            self.data.load,
            self.parts.info.output,
            self.data.contract.regions,
            lambda: bool(stop.signal_number) and jax.process_count() == 1,
            self.config["eval"]["score"],
        )
        progress, score = self.progress, scores[self.config["eval"]["score"]]
        progress.validated_step, progress.stale = self.step, progress.stale + 1
        progress.scores = {name: value for name, value in scores.items() if not math.isnan(value)}
        better = score > (-math.inf if progress.best_score is None else progress.best_score)
        if better:
            progress.best_score, progress.best_step, progress.stale = score, self.step, 0
            if self.primary:
                artefacts.save_best(self.folder, self.parts, devices.to_host(trainable), self.provenance())
        if self.config["optim"]["schedule"] == "plateau":
            self.plateau.update(score)
            progress.plateau = self.plateau.get_state()
        self.log.record(self.step, {VALIDATION + name: value for name, value in scores.items()})
        dice = "  ".join(f"{name} {scores[name]:.4f}" for name in (*self.data.contract.regions, "mean"))
        self.log.say(f"step {self.step}  validation Dice  {dice}{'  best' if better else ''}")
        self.log.pause()

    def save(self) -> None:
        """Starts a checkpoint of this step, unless it has one."""
        if self.step == self.saved_step:
            return
        self.collect()
        records = {
            "data": self.position,
            "progress": dataclasses.asdict(self.progress),
            "config": self.config,
        }
        self.checkpoints.save(self.step, self.state, records, self.progress.best_step)
        self.saved_step = self.step

    def provenance(self) -> dict[str, Any]:
        """What the model directories say about where they come from."""
        return {
            "config": self.config,
            "data": {"name": self.data.name, **self.position},
            "step": self.step,
            "scores": self.progress.scores,
            "base_hash": self.progress.base_hash,
        }

    def finish(self) -> dict[str, Any]:
        """Last validation and checkpoint, the model directory and the result."""
        self.collect()
        if self.progress.window:
            self.write_metrics()
        self.save()
        self.checkpoints.wait()
        result = {
            "step": self.step,
            "best_step": self.progress.best_step,
            "best_score": self.progress.best_score,
            "scores": self.progress.scores,
            "cost": artefacts.costs(self.parts, self.log.seconds_per_step, self.temporary_bytes),
        }
        if self.primary:
            use_best = self.progress.best_score is not None
            weights = devices.to_host(evaluated(self.state))
            artefacts.save_final(
                self.folder, self.parts, weights, self.provenance(), use_best, self.data.name
            )
            workdir.write_json(self.folder / RESULT_FILE, result)
        alone = f", and what it learnt alone: {self.folder / artefacts.ADAPTER}" if self.parts.frozen else ""
        self.log.say(f"finished at step {self.step}: {self.folder / artefacts.FINAL}{alone}")
        return result
