r"""The long fault test-bench: kills, damage, malformed inputs, devices and processes, a study, ten thousand steps.

    make soak                                        # everything, then the table
    python -m tests.faults.soak --section kills      # one part
    python -m tests.faults.soak --table              # the table of the parts that were run

Each part leaves its numbers in ``<folder>/results`` and is not run again while they are there (unless it had faults),
so a stopped soak goes on with the part it was at: kills, malformed and devices with the next run or input, other parts
from their beginning. The exit code is 1 if anything was not as it should be.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.faults import bench

SEED = 0
MOST_DIFFERENCE = 2e-6  # 17 float32 units of a loss from 1 to 2: the parameters carry the rounding of every step on
Part = Callable[[Path, Path], dict[str, Any]]  # (sound inputs, scratch folder) -> rows, faults


def _trained(good: Path) -> tuple[str, ...]:
    return (f"--config.data.store={good / 'cohort'}",)


def kills(good: Path, scratch: Path) -> dict[str, Any]:
    """A hundred times kill -9."""
    from tests.faults import kills

    flags = (*kills.FLAGS, *_trained(good), f"--config.init_from={good / 'model'}")
    found = kills.kill_runs(flags, scratch, wanted=100, seed=SEED)
    rows = {
        "kill -9: tried": f"{found.tried}, {found.during_saves} of them left a half-written checkpoint",
        "kill -9: restarts": f"{found.restarts}, in {found.runs} runs from start to end",
        "kill -9: mismatches": f"{found.mismatches} (bit for bit, against a run left alone)",
    }
    return {"rows": rows, "faults": found.faults}


def damage(good: Path, scratch: Path) -> dict[str, Any]:
    """Checkpoints hit in every file, full and read-only disks."""
    from tests.faults import damage, kills

    flags = (*kills.FLAGS, *_trained(good), f"--config.init_from={good / 'model'}")
    straight = scratch / "straight"
    end = bench.run("train.py", *flags, f"--workdir={straight}", log=scratch / "straight.log")
    if end.code != 0:
        raise RuntimeError(end.errors)
    found = damage.damage_checkpoints(straight / "checkpoints", scratch / "damaged", rounds=4, seed=SEED)
    rows = {
        f"checkpoint, {kind}": f"{found.tried[kind]} tried, {found.detected[kind]} refused, "
        f"{found.harmless[kind]} harmless (same bits came back)"
        for kind in damage.KINDS
    }
    runs = damage.damage_runs(flags, straight, scratch)
    rows["checkpoint or base, through train.py"] = (
        f"{runs.tried['run']} tried, {runs.detected['run']} refused in one line, {runs.harmless['run']} harmless"
    )
    found.faults += runs.faults
    if damage.namespaces_work():
        sizes = ["64k", "400k", "1100k", "1350k", "1600k"]
        disks = damage.fill_disks(flags, straight, scratch, sizes)
        rows |= {f"{kind}": f"{disks.tried[kind]} tried, {disks.detected[kind]} ended in one line and went on after"
                 for kind in disks.tried}  # fmt: skip
        found.faults += disks.faults
    else:
        rows["full disk, read-only folder"] = "not tried: this system lets no user mount a small disk (unshare -Urm)"
    return {"rows": rows, "faults": found.faults}


def malformed(good: Path, scratch: Path) -> dict[str, Any]:
    """Hundreds of inputs through the commands."""
    from tests.faults import fuzz, inputs

    found = fuzz.try_all(inputs.everything(good), good, scratch)
    rows = {
        f"malformed, {area}": f"{tried} tried, {found.refused[area]} refused in one line"
        + (f", {found.accepted[area]} harmless" if found.accepted[area] else "")
        for area, tried in found.tried.items()
    }
    rows["malformed, all"] = (
        f"{found.tried.total()} tried, {found.refused.total()} refused, {found.accepted.total()} harmless; at most "
        f"{found.most_mib:.0f} MiB of memory taken"
    )
    return {"rows": rows, "faults": found.faults}


def _rows(parts: Sequence[Any]) -> dict[str, Any]:
    """Loss differences of a few topologies; more than rounding is a fault."""
    found = {name: value for part in parts for name, value in part.differences.items()}
    scores = {name: value for part in parts for name, value in part.scores.items()}
    rows = {f"devices x processes, {name}": f"loss differs by at most {value:.2g}" for name, value in found.items()}
    for name, value in scores.items():
        rows[f"devices x processes, {name}"] += f", a validation score by at most {value:.2g}"
    faults = [fault for part in parts for fault in part.faults]
    faults += [f"{name}: loss differs by {value}" for name, value in found.items() if not value <= MOST_DIFFERENCE]
    faults += [f"{name}: a score differs by {value}" for name, value in scores.items() if not value <= MOST_DIFFERENCE]
    return {"rows": rows, "faults": faults}


def devices(good: Path, scratch: Path) -> dict[str, Any]:
    """Every number of devices and processes; Dice over the batch and per sample; split optimizer state."""
    from tests.faults import topology as t

    flags = (*t.FLAGS, *_trained(good))
    split = (*flags, "--config.optim.name=adamw", "--config.optim.shard_state=True")
    sample = (*flags, "--config.loss.batch_dice=False")
    full = (*flags, "--config.eval.every=5", "--config.augment.enabled=True")
    parts = [
        t.matrix(flags, scratch / "batch", t.COMBINATIONS, "Dice over the batch"),
        t.matrix(sample, scratch / "sample", ((1, 1), (4, 2), (8, 1)), "Dice per sample"),
        t.matrix(split, scratch / "split", ((1, 1), (4, 2)), "optimizer state split, AdamW"),
        t.matrix(full, scratch / "full", ((1, 1), (4, 1), (4, 2), (4, 4)), "augmented and validated"),
    ]
    return _rows(parts)


def moves(good: Path, scratch: Path) -> dict[str, Any]:
    """Stopped and continued on other devices and processes."""
    from tests.faults import topology as t

    flags = (*t.FLAGS, *_trained(good))
    moved = t.stop_and_go_on(flags, scratch / "run", ((1, 1), (4, 2), (8, 1), (4, 4), (1, 1), (2, 1)), 80, SEED)
    done = _rows([moved])
    for who, times in moved.stopped.items():
        code = 130 if who.startswith("SIGINT") else 75
        done["rows"][f"stopped by {who}"] = f"{times} tried, all processes saved and ended with code {code}"
    return done


def losses(good: Path, scratch: Path) -> dict[str, Any]:
    """One process of two is killed."""
    from tests.faults import topology as t

    lost = t.lose_processes((*t.FLAGS, *_trained(good)), scratch / "lost", 4, SEED)
    seen = f"{lost.lost} times, the other ended in one line; same bits after restart"
    return {"rows": {"one of two processes killed": seen}, "faults": lost.faults}


def study(good: Path, scratch: Path) -> dict[str, Any]:
    """A whole study, killed twice, two processes at the end."""
    from tests.faults import killed_study

    del good  # it has cohorts of its own
    found = killed_study.kill_study(killed_study.study_flags(scratch), scratch, SEED)
    shares = " and ".join(map(str, found.shares))
    rows = {
        "study: killed with all its processes": f"{found.killed} times, {found.processes} processes; "
        f"{found.in_training} left a half-done training run",
        "study: restarted": f"{found.restarts} times; at last two processes side by side, which did {shares} steps",
        "study: files compared": f"{found.compared}: results.json without times, tables, label maps, weights, metrics",
        "study: mismatches": f"{found.mismatches} (byte for byte, against a study left alone)",
    }
    return {"rows": rows, "faults": found.faults}


def _endurance(good: Path, scratch: Path, workers: int) -> dict[str, Any]:
    from tests.faults import endurance

    flags = (*bench.TINY, *_trained(good), f"--config.data.workers={workers}")
    seen = endurance.watch(flags, scratch / "run", early=100, steps=10_000)
    readers = f"{workers} processes" if workers else "threads"
    rows = {
        f"read by {readers}, step {use['step']}": f"{use['memory_mib']:.0f} MiB of memory, "
        f"{use['shared_mib']:.1f} MiB shared in {use['segments']} segments, {use['open_files']} open files"
        for use in seen.values()
    }
    return {"rows": rows, "faults": endurance.growth(seen, readers)}


def endurance(good: Path, scratch: Path) -> dict[str, Any]:
    """Ten thousand steps, the data read by threads."""
    return _endurance(good, scratch, 0)


def endurance_workers(good: Path, scratch: Path) -> dict[str, Any]:
    """Ten thousand steps, the data read by two processes."""
    return _endurance(good, scratch, 2)


PARTS: dict[str, Part] = {
    part.__name__: part
    for part in (kills, damage, malformed, devices, moves, losses, study, endurance, endurance_workers)
}


def prepare(folder: Path) -> Path:
    """Sound inputs, made once: those of the fuzzing and a store of ten cases."""
    from data_pipeline import preprocess
    from tests.faults import fuzz

    good = folder / "good"
    if not (good / "cohort" / "dataset.json").exists():
        shutil.rmtree(good, ignore_errors=True)
        fuzz.make_good(good)
        preprocess.preprocess(bench.write_cases(good / "ten"), good / "cohort", workers=1, progress=False)
    return good


def table(results: Path) -> str:
    """Of the parts that were run, as Markdown."""
    lines = ["| what | seen |", "|---|---|"]
    for part in PARTS:
        file = results / f"{part}.json"
        if file.exists():
            done = json.loads(file.read_text())
            lines += [f"| {what} | {seen} |" for what, seen in done["rows"].items()]
            lines.append(f"| **{part}: not as it should be** | **{len(done['faults'])}** |")
    return "\n".join(lines)


def run_part(name: str, folder: Path) -> list[str]:
    """Runs a part unless its results are there; returns its faults."""
    file = folder / "results" / f"{name}.json"
    if not file.exists() or json.loads(file.read_text())["faults"]:
        good, scratch = prepare(folder), folder / name
        if name not in ("kills", "malformed", "devices"):  # they go on by themselves
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        print(f"{name} ...", flush=True)
        done = PARTS[name](good, scratch)
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(done, indent=1))
    return json.loads(file.read_text())["faults"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=bench.ROOT / "runs" / "soak", help="for everything written")
    parser.add_argument("--section", choices=list(PARTS), action="append", help="only this part; repeat for several")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table")
    options = parser.parse_args()
    folder = options.folder.absolute()
    # Read when JAX is imported, in the process that all others are forked from.
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
                   "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}  # fmt: skip
    faults = []
    for name in () if options.table else options.section or PARTS:
        faults += [f"{name}: {fault}" for fault in run_part(name, folder)]
    print(table(folder / "results"))
    for fault in faults:
        print(f"FAULT {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
