r"""Trains or fine-tunes a network as a config says; the same --workdir goes on where it stopped.

    python launch/train.py --config=configs/pretrain.py --config.data.root=DATA/BraTS2021 --workdir=runs/pretrain
    python launch/train.py --config=configs/peft.py --config.data.root=DATA/BraTS-Africa \
        --config.init_from=runs/pretrain --workdir=runs/peft
    python launch/train.py --config=configs/peft.py --config.peft.method=lora+head ... --dry_run

Exit codes: 0 finished; 1 an error, told in one line; 75 stopped by SIGTERM or SIGUSR1 and 130 by Ctrl-C
(75 with several processes), both after saving: the same command goes on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # configs/ is not installed

import command
from absl import flags, logging
from ml_collections import config_flags

from configs import default

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment file, such as configs/peft.py or configs/peft.py:demo.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Checkpoints, logs and the model go here.")
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Show what the method trains and costs beside full fine-tuning; no data."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "host:port of the first process, to train with several without SLURM or Open MPI."
)
PROCESS_COUNT = flags.DEFINE_integer("process_count", 0, "With --coordinator: how many processes there are.")
PROCESS_ID = flags.DEFINE_integer("process_id", -1, "With --coordinator: which one this is, from 0.")
DETERMINISTIC_COST = (
    "config.deterministic: on a GPU XLA may use only kernels that give the same bits every time, and does not "
    "choose among them by timing: steps take longer, with convolutions most; on a CPU it changes nothing"
)


def run(config, workdir: str) -> dict:
    """Trains; returns what ``train.loop.fit`` returns."""
    from mednext_jax.train import devices

    if config.deterministic:
        devices.make_deterministic()
    import jax  # imports take seconds: not before the flags were checked
    import processes
    import training_data

    from mednext_jax.train import experiment, loop, preemption
    from mednext_jax.train.workdir import plain

    experiment.check_config(plain(config))  # a typo is told before a cohort is preprocessed
    with processes.joined(COORDINATOR.value, PROCESS_COUNT.value, PROCESS_ID.value):
        if config.deterministic and jax.process_index() == 0:
            print(DETERMINISTIC_COST, flush=True)
        with preemption.stopped_at_once(workdir):
            data = training_data.open_data(config, workdir)
        try:
            return loop.fit(config, data, workdir)
        finally:
            data.stream.close()


def main(_) -> int:
    """Trains, or shows what a run would cost; returns the exit code of the module's docstring."""
    logging.set_verbosity(logging.ERROR)  # Orbax reports every file it opens
    config = CONFIG.value
    if config is None:
        raise ValueError("no --config: give an experiment file, such as --config=configs/peft.py")
    if absent := set(default.get_config()) - set(config):
        raise ValueError(f"the config has no field {min(absent)!r}: it is none for launch/train.py, whose fields "
                         "configs/default.py lists (configs/study.py is for launch/study.py)")  # fmt: skip
    if DRY_RUN.value:
        from mednext_jax.train import dry_run, workdir

        for part in dry_run.report(workdir.plain(config)):
            print(part, flush=True)
        return 0
    if not WORKDIR.value:
        raise ValueError("no --workdir: give the folder for checkpoints, logs and the model")
    import jax

    from mednext_jax.train.preemption import Interrupted

    try:
        run(config, WORKDIR.value)
    except Interrupted as stopped:
        if jax.process_index() == 0:
            print(stopped, flush=True)
        return stopped.exit_code
    return 0


if __name__ == "__main__":
    command.run(main)
