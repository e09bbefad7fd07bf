r"""Measures speed and memory on this machine, beside its ceilings and beside upstream's PyTorch network.

    python launch/benchmark.py step --variant=S --size=64 --peer=CHECKOUT_OF_MEDNEXT --json=step.json
    python launch/benchmark.py step --variant=S --size=128 --batch=2 --dtype=bfloat16 --deep_supervision
    python launch/benchmark.py predict --volume=240,240,155 --peer=CHECKOUT_OF_MEDNEXT
    python launch/benchmark.py COMMAND --help

Times are medians of runs that alternate, each in a process of its own in step, predict and beside a peer; a ratio is
ours over the peer's. FLOPs are those of the traced program, bytes those of the compiled one, loops counted as often as
they run; floor_share is the time that the machine's measured ceilings (copying, multiplying matrices of type --dtype)
allow, over the time taken; what stays in a cache can bring it above 1. --peer takes a checkout of MIC-DKFZ/MedNeXt, and
PyTorch.
"""

import argparse
import difflib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # configs/ is not installed

import command
from absl.flags import argparse_flags

Result = dict[str, Any]


def step(options: argparse.Namespace) -> Result:
    """Forward, and forward + backward, of a network: time, FLOPs, bytes, memory; upstream's network with --peer."""
    from benchmarks import apart, ours, profile, timing, upstream

    if options.profile:
        Path(options.profile).mkdir(parents=True, exist_ok=True)  # told before the work if it cannot be
    own, peers = ours.step_works(network_of(options), options.batch, options.size), []
    if options.peer:
        upstream.check(Path(options.peer))
        peers = upstream.step_works(
            Path(options.peer), network_of(options), options.batch, options.size, layouts_of(options),
            options.peer_compile,
        )  # fmt: skip
    found = timing.result(apart.measure([*own, *peers], options.repeats, memory=not options.skip_memory), options.dtype)
    if options.profile:
        found["trace"] = options.profile
        found["profile"] = {work.name: apart.run(profile.of, work, options.profile) for work in own}
    return found


def peft(options: argparse.Namespace) -> Result:
    """Each fine-tuning method's training step beside full fine-tuning's, and beside upstream's network with --peer."""
    from benchmarks import ours, timing, upstream

    arguments, peers = (network_of(options), options.size, options.batch), []
    if options.peer:
        upstream.check(Path(options.peer))
        network, size, batch = arguments
        peers = upstream.training_works(
            Path(options.peer), network, batch, size, layouts_of(options), options.peer_compile
        )
    table, rows = ours.peft_rows(*arguments, options.repeats, options.methods, peers, not options.skip_memory)
    found = timing.result(rows, options.dtype)
    own, others = ([row for row in found["rows"] if timing.is_ours(row["name"]) == mine] for mine in (True, False))
    found["ratio_to_peer"] = {f"{row['name']} against {other['name']}": timing.shares(row, other)
                              for other in others for row in own}  # fmt: skip
    columns = ("name", "seconds", "fastest", "slowest", "gflop", "gbytes", "temporaries_gb", "peak_memory_gb",
               "floor_seconds")  # fmt: skip
    measured = [{name: row[name] for name in columns if name in row} for row in found["rows"]]
    return found | {"table": f"{table}\n\n{timing.table(found | {'rows': measured})}"}


def depthwise(options: argparse.Namespace) -> Result:
    """Each depthwise operation and its gradients beside a copy of its bytes; PyTorch's own with --peer."""
    from benchmarks import apart, ours, timing, upstream

    arguments, peers = (options.batch, options.size, options.channels, options.dtype), []
    if options.peer:
        upstream.check(Path(options.peer))
        peers = upstream.depthwise_works(*arguments, layouts_of(options))
    return timing.result(apart.beside(ours.depthwise_works(*arguments), peers, options.repeats), options.dtype)


def data(options: argparse.Namespace) -> Result:
    """Crops that a store gives, per second and per core, beside what a training step of that size needs."""
    from benchmarks import data, ours, timing

    from data_pipeline.store import Store

    with tempfile.TemporaryDirectory() as folder:
        store = Store(options.store) if options.store else data.noise_store(Path(folder) / "store")
        rows = [data.row(store, options.size, options.batch, options.threads, options.workers, options.repeats)]
    if not options.skip_step:
        _, work = ours.step_works(network_of(options), options.batch, options.size)
        rows.append(data.demand(options.batch, timing.measure([work], options.repeats)[0]["seconds"]))
    return timing.result(rows, options.dtype)


def predict(options: argparse.Namespace) -> Result:
    """A whole volume by sliding window; MONAI's around upstream's network with --peer."""
    from benchmarks import apart, predict, timing, upstream

    arguments = (options.volume, options.size, options.overlap, options.windows_per_batch)
    works = [predict.work(network_of(options), *arguments)]
    if options.peer:
        upstream.check(Path(options.peer))
        predict.check()
        works += predict.peer_works(
            Path(options.peer), network_of(options), *arguments, layouts_of(options), options.peer_compile
        )
    return timing.result(apart.measure(works, options.repeats, memory=not options.skip_memory), options.dtype)


def compile(options: argparse.Namespace) -> Result:
    """Seconds to compile the training step, cold and from the cache, each in a fresh process."""
    from benchmarks import compiling, timing

    from configs import pretrain
    from mednext_jax.train import workdir

    config = pretrain.get_config()
    config.model.update(network_of(options))
    config.data.update(patch_voxels=(options.size,) * 3, batch_size=options.batch)
    return timing.result(compiling.rows(workdir.plain(config), options.repeats), options.dtype)


def deviceless(options: argparse.Namespace) -> Result:
    """Memory and traffic of steps on a GPU that is not here: compiled for it from its description, not run."""
    from benchmarks import deviceless, timing

    rows = deviceless.rows(network_of(options), options.size, options.batch, options.methods, Path(options.gpu))
    return {"command": sys.argv, "table": "\n".join(timing.plain_table(rows)), "rows": rows}


def network_of(options: argparse.Namespace) -> dict[str, Any]:
    """The network's part of the options."""
    found = {name: getattr(options, name) for name in ("variant", "kernel_size", "dtype")}
    trained = {"deep_supervision": False, "remat": "mlp"}  # no options where nothing is trained
    return found | {name: getattr(options, name, default) for name, default in trained.items()}


def layouts_of(options: argparse.Namespace) -> Sequence[str]:
    """The memory layouts in which the peer is timed."""
    from benchmarks import upstream

    return upstream.LAYOUTS if options.peer_layout == "both" else (options.peer_layout,)


def volume(text: str) -> tuple[int, ...]:
    """Reads ``240,240,155``."""
    sizes = tuple(int(size) if size.isdecimal() else 0 for size in text.split(","))
    if len(sizes) != 3 or not all(1 <= size <= LARGEST for size in sizes):
        raise argparse.ArgumentTypeError(f"{text}: give three sizes from 1 to {LARGEST}, like 240,240,155")
    return sizes


def whole(least: int, most: int | None = None, multiple: int = 1) -> Callable[[str], int]:
    """Reads a whole number from ``least`` to ``most``, a multiple of ``multiple``."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least or (most and int(text) > most) or int(text) % multiple:
            kind = "whole number" if multiple == 1 else f"multiple of {multiple}"
            bounds = f"from {least} to {most}" if most else f"of at least {least}"
            raise argparse.ArgumentTypeError(f"{text} is no {kind} {bounds}")
        return int(text)

    return read


def method_names(text: str) -> list[str]:
    """Reads ``lora,conv_adapter:gamma=2``."""
    names = [name for name in text.split(",") if name]
    if not names:
        raise argparse.ArgumentTypeError("names no method")
    return names


LARGEST = 1024  # size along an axis
positive = whole(1)
patch = whole(16, LARGEST, multiple=16)


class OneLineParser(argparse_flags.ArgumentParser):
    """Tells what is wrong with a command line in one line."""

    def error(self, message: str) -> None:
        self.exit(1, f"error: {' '.join(message.split())}; see {self.prog} --help\n")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command and its options."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(prog="benchmark.py", description=__doc__, formatter_class=raw)
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    added = {}
    for run in (step, peft, depthwise, data, predict, compile, deviceless):
        added[run] = parsers.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        added[run].set_defaults(run=run)

    def option(name: str, commands: Sequence, help: str, **more: Any) -> None:
        text = help + (" Default: %(default)s." if more.get("default") not in (None, "", []) else "")
        for run in commands:
            added[run].add_argument(f"--{name}", help=text, **more)

    every, networks = tuple(added), (step, peft, data, predict, compile, deviceless)
    peers, trained = (step, peft, depthwise, predict), (step, peft, data, compile, deviceless)
    option("variant", networks, "Network.", choices=["S", "B", "M", "L"], default="S")
    option("kernel_size", networks, "Kernel size of the network.", type=int, choices=[3, 5], default=3)
    option("deep_supervision", trained, "All five heads.", action="store_true")
    option("remat", trained, "What the backward pass computes again.", choices=["none", "mlp", "block"], default="mlp")
    option("dtype", every, "Compute type.", choices=["float32", "bfloat16"], default="float32")
    option("size", (step, peft, compile, deviceless), "Edge of the cubic patch.", type=patch, default=64)
    option("size", (depthwise,), "Edge of the cubic array.", type=whole(2, LARGEST), default=64)
    option("size", (data,), "Edge of the cubic crop.", type=patch, default=128)
    option("size", (predict,), "Edge of the cubic window.", type=patch, default=128)
    option("batch", (step, peft, depthwise, data, compile, deviceless), "Patches.", type=positive, default=1)
    option("channels", (depthwise,), "Channels.", type=positive, default=32)
    option("gpu", (deviceless,), "Its description, such as launch/benchmarks/h200.txtpb.", required=True)
    option("methods", (peft, deviceless),
           "Separated by commas, each a name or name:option=value (true, false, numbers, words). Without: all of them; "
           "deviceless full alone.", type=method_names, default=[])
    option("store", (data,), "Store to read; else one of noise is written and removed again.", default="")
    option("threads", (data,), "Reading threads.", type=positive, default=2)
    option("workers", (data,), "Reading processes, instead of threads.", type=whole(0), default=0)
    option("skip_step", (data,), "Leave the step's demand out.", action="store_true")
    option("volume", (predict,), "Size of the volume.", type=volume, default="240,240,155")
    option("overlap", (predict,), "Share of a window that its neighbour covers.", type=float, default=0.5)
    option("windows_per_batch", (predict,), "Windows computed at once.", type=positive, default=1)
    option("peer", peers, "Checkout of upstream MedNeXt to time beside ours.", default="")
    option("peer_layout", peers, "The peer's memory layout.", choices=["both", "default", "channels-last"],
           default="both")
    option("peer_compile", (step, peft, predict), "Also time the peer under torch.compile.", action="store_true")
    option("skip_memory", (step, peft, predict), "Leave peak memory and its run out.", action="store_true")
    option("profile", (step,), "Tell what takes longest in ours, by a trace that is left in this folder.", default="")
    option("repeats", [run for run in every if run is not deviceless], "Timed runs of each.", type=positive, default=3)
    option("json", every, "Write the figures to this file too.", default="")
    options, unknown = parser.parse_known_args(argv[1:])
    if unknown:
        own = added[options.run]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], own._option_string_actions, 1)
        own.error(f"unknown option {unknown[0]}" + (f", did you mean {near[0]}?" if near else ""))
    return options


def main(options: argparse.Namespace) -> None:
    """Runs one sub-command and prints its table; ValueError or OSError for options that do not fit, or after the table
    for a peer that failed."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share a card
    if options.json and not Path(options.json).absolute().parent.is_dir():  # before the work, not after it
        raise ValueError(f"--json={options.json}: there is no such folder; make it or give another path")
    if options.json and Path(options.json).is_dir():
        raise ValueError(f"--json={options.json} is a folder; give the path of a file")
    if options.json and not os.access(Path(options.json).absolute().parent, os.W_OK):
        raise ValueError(f"--json={options.json}: this folder cannot be written; give another path")
    try:
        found = options.run(options)
    except Exception as error:
        if isinstance(error, MemoryError) or command.ran_out_of_memory(error):
            raise ValueError("there is too little memory for this; take smaller sizes, or fewer at once") from error
        raise
    from benchmarks import timing

    print(found["table"] if "table" in found else timing.table(found))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if failed := found.get("failed"):
        raise ValueError("; ".join(f"{name} was not measured: {why}" for name, why in failed.items()))


if __name__ == "__main__":
    command.run(main, parse)
