"""Malformed splits, stores and config overrides."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults import bench
from tests.faults.fuzz import Malformed
from tests.faults.malformed_images import write_case

GOOD_CASE = "BraTS-SSA-00000-000"
TRAIN = (
    *bench.TINY, "--config.optim.total_steps=1", "--config.optim.warmup_steps=0", "--config.eval.every=0",
    "--workdir={out}/run",
)  # fmt: skip
OTHER_TYPES = (None, -1, 1e308, True, "../../elsewhere", [], {}, [[]], {"a": {}})


def not_json(sound: str) -> Iterator[tuple[str, bytes]]:
    """What stands where JSON should: cut, nested without end, of other encodings, or nothing."""
    data = sound.encode()
    yield from ((f"cut at {part}/8", data[: len(data) * part // 8]) for part in range(8))
    yield from ((f"{text}", text.encode()) for text in ("null", "1", '"x"', "[]", "[1]", "NaN", "true", "{", "{}x"))
    yield "nested 100,000 deep", b"[" * 100_000
    yield "an object nested 50,000 deep", b'{"a":' * 50_000
    yield "a number of 10,000 digits", b'{"train": ' + b"9" * 10_000 + b"}"
    yield "UTF-16 without a mark", sound.encode("utf-16-be")[1:]
    yield "binary", bytes(range(256))
    yield "pickle", b"\x80\x04\x95."
    yield "zeros", bytes(100)


def other_types(sound: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each field missing, or of some types that are not its own."""
    for number, (name, value) in enumerate(sound.items()):
        yield f"no {name}", {key: kept for key, kept in sound.items() if key != name}
        for other in OTHER_TYPES[number % 2 :: 2]:
            if not isinstance(other, type(value)):
                yield f"{name} is {str(other)[:20]}", {**sound, name: other}


def _splits(content: bytes, folder: Path) -> None:
    for number in range(3):
        write_case(folder / "cases", case=f"BraTS-SSA-0000{number}-000")
    write_case(folder / "cases", case="BraTS-SSA-00000-001")  # a second time point of the first patient
    (folder / "splits.json").write_bytes(content)


def splits() -> Iterator[Malformed]:
    """The user's file for ``--splits``."""
    a, b, c, again = (f"BraTS-SSA-{name}" for name in ("00000-000", "00001-000", "00002-000", "00000-001"))
    flags = ("--input={in}/cases", "--output={out}/store", "--workers=1", "--splits={in}/splits.json")
    wrong = [
        {"train": ["../../elsewhere"], "val": [b]}, {"train": ["/etc/passwd"]}, {"train": [""]}, {"train": [None]},
        {"train": [1, 2]}, {"train": a}, {"train": {a: b}}, {"train": [[a]]}, {"train": [a, a]}, {"train": ["x\ny"]},
        {"train": [a, b], "val": [b]}, {"train": [a], "val": [again]}, {"train": [a], "test": [again]},
        {"fold0": {"train": [a]}}, {"fold0": {"train": [a], "val": [a]}}, {"fold0": [{"train": [a], "val": [b]}]},
        {"fold0": {"train": [a, b], "val": [c], "test": []}}, {"fold0": {"train": a, "val": b}},
        [{"train": [a]}], [{"train": [a], "val": [again]}], [{}], [[a], [b]], [None], {"train": [a + "\0"]},
        {"train": [a + " "]}, {"train": ["ünïcödé"]}, {"train": ["a" * 100_000]}, {"train": None, "val": None},
        {"../../elsewhere": {"train": [a], "val": ["nobody"]}}, {"": [c, "nobody"]},
    ]  # fmt: skip
    sound = json.dumps({"train": [a, again], "val": [b]})
    for name, content in (*not_json(sound), *((json.dumps(w)[:60], json.dumps(w).encode()) for w in wrong)):
        yield Malformed("splits", name, "preprocess.py", flags, partial(_splits, content),
                        told=("splits.json",))  # fmt: skip


def _store(change: Callable[[Path], None], folder: Path, good: Path) -> None:
    shutil.copytree(good / "store", folder / "store")
    change(folder / "store")


def _write(name: str, content: bytes | dict, store: Path) -> None:
    (store / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def _array(name: str, change: Callable[[bytes], bytes] | np.ndarray, store: Path) -> None:
    """Damages an array of every case, so that whichever is read first is damaged."""
    for file in store.glob(f"cases/*/{name}"):
        if isinstance(change, np.ndarray):
            np.save(file, change)
        else:
            file.write_bytes(change(file.read_bytes()))


def _record(change: dict[str, Any], store: Path) -> None:
    for file in store.glob("cases/*/case.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | change))


def stores(good: Path) -> Iterator[Malformed]:
    """What ``launch/preprocess.py`` wrote, damaged or forged, read by a training run."""
    flags = (*TRAIN, "--config.data.store={in}/store")
    changes: list[tuple[str, str, Callable[[Path], None]]] = []  # the damaged file first
    for name in ("dataset.json", "splits.json"):
        text = (good / "store" / name).read_text()
        changes += [(name, f"{name}: {what}", partial(_write, name, bad)) for what, bad in not_json(text)]
    dataset = json.loads((good / "store" / "dataset.json").read_text())
    names = ("format_version", "channels", "label_scheme", "normalization", "spacing_mm", "data_hash", "cases")
    needed = {name: dataset[name] for name in names}
    changes += [("dataset.json", f"dataset.json: {what}", partial(_write, "dataset.json", bad))
                for what, bad in other_types(needed)]  # fmt: skip
    row = dataset["cases"][GOOD_CASE]
    for case in ("../../elsewhere", "/etc", "..", "", ".hidden", "a/b", "a\0b", "ü", "x" * 300):
        forged = {**dataset, "cases": {**dataset["cases"], case: row}}
        changes.append(("dataset.json", f"case named {case[:20]!r}", partial(_write, "dataset.json", forged)))
    unlabelled = {case: {**row, "labelled": None} for case, row in dataset["cases"].items()}
    forged = {**dataset, "cases": unlabelled}
    changes.append(("dataset.json", "labelled is None", partial(_write, "dataset.json", forged)))
    for case in ("../../elsewhere", "nobody", 5, None):
        forged = {"fold0": {"train": [case], "val": []}}
        changes.append(("splits.json", f"fold of {case!r}", partial(_write, "splits.json", forged)))
    huge = (3_000_000_000, 3_000_000_000, 3_000_000_000)
    for change in (
        {"case_id": "other"}, {"shape": [0, 1, 1]}, {"shape": list(huge)}, {"shape": "abc"}, {"shape": None},
        {"shape": [1, 2]}, {"foreground": {"WT": [[-1, 0, 0]]}}, {"foreground": {"WT": [[999, 0, 0]]}},
        {"foreground": [1]}, {"foreground": {"WT": "x"}}, {"foreground": {"WT": [[1e99, 0, 0]]}}, {"labelled": False},
    ):  # fmt: skip
        changes.append(("case.json", f"case.json: {change}", partial(_record, change)))
    for name in ("image.npy", "label.npy"):
        header = b"\x93NUMPY\x01\x00v\x00" + f"{{'descr': '<f2', 'fortran_order': False, 'shape': {huge}, }}".encode()
        for what, change in {
            "empty": lambda data: b"", "half": lambda data: data[: len(data) // 2],
            "one byte short": lambda data: data[:-1], "zeros": lambda data: bytes(len(data)),
            "huge": lambda data, header=header: header.ljust(127) + b"\n" + data[128:],
            "pickle": np.array([{"a": 1}], dtype=object), "other shape": np.zeros((3, 3), np.float16),
            "other type": np.zeros((4, 4, 4), np.complex128),
        }.items():  # fmt: skip
            changes.append((name, f"{name}: {what}", partial(_array, name, change)))
    changes.append(("cases", "no cases", lambda store: shutil.rmtree(store / "cases")))
    changes.append(("cases", "cases are a link to nothing", _dangling))
    for file, name, change in changes:
        told = (file, "in/store")
        yield Malformed("store", name, "train.py", flags, partial(_store, change, good=good), told=told)


def _dangling(store: Path) -> None:
    shutil.rmtree(store / "cases")
    (store / "cases").symlink_to("nowhere")


# Overrides of fields, and configs that are none; each is refused before anything is made.
OVERRIDES = (
    "no_such=1", "data.no_such=1", "optim=1", "data.patch_voxels=16", "data.patch_voxels=16,16", "optim.clip_norm=-1",
    "data.patch_voxels=(16,16,17)", "data.patch_voxels=(0,0,0)", "data.patch_voxels=(-16,16,16)", "optim.b1=nan",
    "data.patch_voxels=(1e9,16,16)", "data.patch_voxels=abc", "data.batch_size=0", "data.batch_size=-2",
    "data.batch_size=1.5", "data.batch_size=", "data.batch_size=2x", "data.foreground_fraction=2", "optim.b1=1",
    "data.foreground_fraction=nan", "data.foreground_fraction=-0.1", "data.weights=1,2,3", "data.weights=-1",
    "data.fold=99", "data.fold=x", "data.train_split=nothing", "data.train_split=../../x", "data.max_train_cases=999",
    "data.order_seed=99999999999999", "data.workers=-1", "data.threads=-1", "data.buffer=-1", "seed=-1", "seed=x",
    "seed=99999999999999999999", "optim.total_steps=0", "optim.total_steps=-5", "optim.total_steps=1e3x",
    "optim.name=adagrad", "optim.name=", "optim.peak_lr=nan", "optim.peak_lr=inf", "optim.peak_lr=-1", "optim.b2=2",
    "optim.schedule=magic", "optim.warmup_steps=-1", "optim.accumulate=0", "optim.accumulate=3", "optim.eps=nan",
    "optim.ema_decay=2", "optim.ema_decay=nan", "optim.layer_decay=-1", "optim.weight_decay=nan", "optim.b1=-0.5",
    "optim.groups=(1,2)", "optim.groups=((1,2,3),)", "optim.momentum=nan", "optim.final_fraction=nan",
    "model.variant=Q", "model.kernel_size=2", "model.kernel_size=-3", "model.n_channels=-1", "model.output=pixels",
    "model.block_counts=(1,2)", "model.block_counts=(-1,0,0,0,0,0,0,0,0)", "model.dtype=float8", "model.remat=maybe",
    "model.exp_r=-2", "peft.method=magic", "peft.method=", "peft.method=lora+", "peft.rank=-1", "peft.gamma=0",
    "loss.dice_weight=nan", "loss.ce_weight=-1", "eval.score=best", "eval.overlap=1", "eval.overlap=nan",
    "eval.overlap=-1", "eval.windows_per_device=0", "eval.patience=-1", "eval.every=-1", "eval.max_cases=-1",
    "log_every=0", "checkpoint_every=-1", "resume_step=7", "resume_step=-1", "max_bad_steps=-1", "n_devices=64",
    "n_devices=-1", "init_from=nowhere", "init_from=/dev/null", "init_from=../../..", "init_from=\0",
    "init_head=maybe", "deterministic=perhaps", "augment.enabled=maybe", "augment.scale=(2,1)", "augment.scale=1,2,3",
    "augment.noise_probability=2", "augment.noise_probability=nan", "augment.rotation_deg=nan",
    "seed=__import__('os').system('touch elsewhere')", "data.patch_voxels=__import__('os').getcwd()",
    "data.root=nowhere", "data.root=/dev/null", "data.root=a,b,c", "data.store=/dev/null",
)  # fmt: skip
CONFIGS = {
    "missing": None, "empty": "", "syntax": "def get_config(:\n", "raises": "raise SystemError('a\\nb')\n",
    "no function": "x = 1\n", "wrong value": "def get_config():\n    return 5\n", "binary": "\udcff\udcfe\0",
    "divides by zero": "def get_config():\n    return 1 / 0\n",
}  # fmt: skip


def _config(text: str | None, folder: Path) -> None:
    if text is not None:
        (folder / "config.py").write_bytes(text.encode("utf-8", "surrogateescape"))


def overrides() -> Iterator[Malformed]:
    """Values that no run can have, and files that are no configs."""
    for override in OVERRIDES:
        if "\0" in override:  # no command line can hold it
            continue
        field, _, value = override.partition("=")
        unset = {field, "data.fold"} if field == "data.train_split" else {field}  # a tuple given twice is joined
        base = [flag for flag in TRAIN if flag.partition("=")[0].removeprefix("--config.") not in unset]
        store = () if field == "data.root" else ("--config.data.store={good}/store",)
        flags = (*base, *store, f"--config.{override}")
        told = (value if field == "init_from" else field.rpartition(".")[2],)  # a folder is told by its path
        yield Malformed("config override", override, "train.py", flags, told=told)
    for name, text in CONFIGS.items():
        flags = ("--config={in}/config.py", "--workdir={out}/run")
        yield Malformed("config override", f"config file: {name}", "train.py", flags, partial(_config, text))
    for name, flags in {
        "no workdir": TRAIN[:-1], "no config": ("--workdir={out}/run",), "stray word": (*TRAIN, "stray"),
        "unknown flag": (*TRAIN, "--no_such_flag"), "config is a folder": ("--config={in}", "--workdir={out}/run"),
        "workdir is a file": (*TRAIN[:-1], "--config.data.store={good}/store", "--workdir={good}/store/dataset.json"),
        "workdir below a file": (*TRAIN[:-1], "--config.data.store={good}/store", "--workdir=/dev/null/run"),
        "process_id alone": (*TRAIN, "--coordinator=127.0.0.1:1", "--process_id=3"),
    }.items():  # fmt: skip
        yield Malformed("config override", name, "train.py", tuple(flags))
