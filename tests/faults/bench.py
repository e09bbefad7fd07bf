"""What every part of the fault test-bench uses: tiny cases, the real commands in processes of their own.

A process is forked from a server that has imported the libraries and nothing else, then runs ``launch/<command>``
as its main program. That saves the seconds of a new interpreter, so that hundreds of processes are affordable;
what runs is the same file with the same flags, in a process that can be killed. It differs from a new interpreter
in that ``atexit`` functions do not run.
"""

import multiprocessing
import os
import runpy
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from data_pipeline.cohorts import CHANNELS

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("jax", "flax", "optax", "orbax.checkpoint", "grain", "nibabel", "scipy.ndimage", "safetensors.numpy",
             "ml_collections.config_flags", "tensorboardX", "tqdm", "absl.app", "mednext_jax.train.loop",
             "data_pipeline.preprocess", "data_pipeline.stream")  # fmt: skip
SECONDS = 300.0  # longest life of a process; what takes longer hangs
LAST_WORDS_SECONDS = 20.0

_SMALL = (
    "--config.data.patch_voxels=(16,16,16)", "--config.data.fold=0", "--config.augment.enabled=False",
)  # fmt: skip
TINY = (
    f"--config={ROOT}/configs/pretrain.py:demo", "--config.model.n_channels=2", "--config.model.exp_r=1",
    "--config.model.kernel_size=1", "--config.model.block_counts=(0,0,0,0,0,0,0,0,0)", *_SMALL,
)  # fmt: skip
# An adapter run on the tiny network: few leaves are trained, the base stays outside the checkpoints.
ADAPTER = (f"--config={ROOT}/configs/peft.py:demo", "--config.peft.gamma=2", "--config.optim.ema_decay=0.9", *_SMALL)


def xla_flags(n_devices: int = 1) -> str:
    """So many CPU devices; and level 0, which halves the time to compile, for that is what these tiny runs spend."""
    return f"--xla_force_host_platform_device_count={n_devices} --xla_backend_optimization_level=0"


def write_cases(root: Path, count: int = 10, shape: tuple[int, ...] = (22, 19, 17)) -> Path:
    """Writes cases in BraTS-SSA layout, each a bright ball of three labels in a round brain."""
    rng = np.random.default_rng(0)
    radius = np.linalg.norm(np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) - 9, axis=-1)
    label = np.select([radius < 2, radius < 3, radius < 5], [1, 3, 2]).astype(np.uint8)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    for i in range(count):
        name = f"BraTS-SSA-{i:05d}-000"
        (root / name).mkdir(parents=True)
        for channel in CHANNELS:
            image = np.where(radius < 9, 100 + 40 * label + rng.normal(0, 5, shape), 0).astype(np.float32)
            nib.save(nib.Nifti1Image(image, affine), root / name / f"{name}-{channel}.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), root / name / f"{name}-seg.nii.gz")
    return root


def is_dump(text: str) -> bool:
    """Whether there is a traceback in it, or a dump of the interpreter's stack."""
    return "Traceback" in text or "Fatal Python error" in text


@dataclass(frozen=True)
class Outcome:
    """How a process ended.

    Attributes:
      code: negative for a signal; None if it hung and had to be stopped.
      output, errors: what it printed.
      peak_bytes: memory it took beyond what the imported libraries hold; 0 if it was killed.
    """

    code: int | None
    output: str
    errors: str
    peak_bytes: int = 0

    @property
    def told(self) -> bool:
        """Whether the last line says what was wrong, without a traceback or a dump of the interpreter's stack."""
        lines = self.errors.strip().splitlines()
        said = bool(lines) and lines[-1].startswith("error: ")
        return said and not is_dump(self.errors + self.output)

    @property
    def clean(self) -> bool:
        """Whether it is a refusal as it should be: code 1 and :attr:`told`."""
        return self.code == 1 and self.told


class Command:
    """A command of ``launch/`` in a process of its own; the process is ended at the end of a ``with`` block.

    Args:
      name: file in ``launch/``.
      arguments: its flags.
      n_devices: CPU devices that JAX sees.
      folder: where it runs.
      wrapper: called in the process first (to take rights or space away from it).
    """

    def __init__(self, name: str, *arguments: str, log: Path, n_devices: int = 1, folder: Path = ROOT, wrapper=None):
        self._log = log
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(LIBRARIES))
        given = (name, arguments, log, n_devices, folder, wrapper)
        self.process = context.Process(target=_main, args=given, daemon=False)
        self.process.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def read(self, suffix: str = ".out") -> str:
        """What it has printed so far; ``.err``: to stderr."""
        file = self._log.with_suffix(suffix)
        return file.read_text(errors="replace") if file.exists() else ""

    def wait(self, seconds: float = SECONDS, last_words: str = "") -> Outcome:
        """Until its end, at most so long.

        Args:
          last_words: waited for a little beyond the end: of a process that is aborted, another one says what happened.
        """
        self.process.join(seconds)
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        while last_words not in self.read(".err") and time.monotonic() < deadline:
            time.sleep(0.05)
        hung = self.process.exitcode is None
        if hung:
            self.process.kill()
            self.process.join()
        peak = int(self.read(".peak") or 0)
        return Outcome(None if hung else self.process.exitcode, self.read(), self.read(".err"), peak)

    def wait_for(self, condition, seconds: float = SECONDS) -> bool:
        """Whether ``condition()`` became true before the process or the time ended; asked again and again."""
        deadline = time.monotonic() + seconds
        while self.alive and time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(0.003)
        return False

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_) -> None:
        if self.alive:
            self.process.kill()
        self.process.join()
        self.process.close()


def run(name: str, *arguments: str, log: Path, **options) -> Outcome:
    """Runs a command to its end."""
    with Command(name, *arguments, log=log, **options) as command:
        return command.wait()


def _main(name: str, arguments: tuple[str, ...], log: Path, n_devices: int, folder: Path, wrapper) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.chdir(folder)
    for number, suffix in ((1, ".out"), (2, ".err")):
        target = os.open(log.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, number)
        os.close(target)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    os.environ["XLA_FLAGS"] = xla_flags(n_devices)
    if wrapper is not None:
        wrapper()
    script = ROOT / "launch" / name
    sys.argv = [str(script), *arguments]
    sys.path[:0] = [str(script.parent)]
    log.with_suffix(".peak").unlink(missing_ok=True)
    before = _peak_bytes()
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        log.with_suffix(".peak").write_text(str(_peak_bytes() - before))


def _end_with_parent() -> None:
    """A bench that is killed leaves no training runs behind."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _peak_bytes() -> int:
    """Most memory that this process ever held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
