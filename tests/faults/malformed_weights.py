"""Malformed and hostile weights: model directories, adapters, and PyTorch's files."""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from mednext_jax import modeldir, tensor_file
from tests.faults.fuzz import Malformed
from tests.faults.malformed_tables import not_json, other_types

MERGE = ("--model={in}/model", "--adapter={in}/adapter", "--output={out}/merged")


def safetensors(header: bytes | dict, data: bytes = bytes(64), length: int | None = None) -> bytes:
    """A file of that format, its header or the header's length as told."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _tensor(**changes: Any) -> dict:
    return {"stem/bias": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes}


def forged_tensors(sound: bytes, step: int) -> Iterator[tuple[str, bytes]]:
    """Cuts of a sound file, a flipped bit here and there, and headers that lie."""
    for cut in range(0, len(sound), step):
        yield f"cut at byte {cut}", sound[:cut]
    for place in range(3, len(sound), step * 2):
        flipped = bytearray(sound)
        flipped[place] ^= 16
        yield f"bit flipped in byte {place}", bytes(flipped)
    huge = 2**62
    yield "header longer than the file", safetensors(_tensor(), length=huge)
    yield "header of 1 GB", safetensors(_tensor(), length=2**30)
    yield "header not JSON", safetensors(b"{'a': 1}")
    yield "header nested 50,000 deep", safetensors(b'{"a":' * 50_000)
    yield "header a list", safetensors(b"[]")
    yield "no tensors", safetensors({}, b"")
    yield "other tensors", safetensors(_tensor(), bytes(16))
    for name, change in {
        "huge shape": {"shape": [huge, huge]}, "shape that overflows": {"shape": [2**32, 2**32]},
        "huge and empty": {"shape": [0, huge]}, "negative shape": {"shape": [-4]}, "no such dtype": {"dtype": "F128"},
        "offsets beyond the end": {"data_offsets": [0, huge], "shape": [huge // 4]},
        "offsets backwards": {"data_offsets": [16, 0]}, "negative offsets": {"data_offsets": [-16, 0]},
        "shape not numbers": {"shape": ["a"]}, "path outside": {},
    }.items():  # fmt: skip
        header = _tensor(**change)
        if not change:
            header = {"../../elsewhere": header["stem/bias"]}
        yield name, safetensors(header, bytes(16))  # all of it described: the library leaves the name to us


def _with(change: Callable[[Path], None], folder: Path, good: Path) -> None:
    shutil.copytree(good / "model", folder / "model")
    shutil.copytree(good / "adapter", folder / "adapter")
    change(folder)


def _write(name: str, content: bytes | dict, folder: Path) -> None:
    (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def _link(name: str, target: str, folder: Path) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(target)


def _outside(folder: Path) -> None:
    """A further tensor of an adapter whose name is a way out, all hashes being right."""
    file, description = folder / "adapter/adapter_model.safetensors", folder / "adapter/adapter_config.json"
    tensors = {**load_file(file), "../../elsewhere": np.zeros(4, np.float32)}
    tensor_file.write(file, tensors)
    config = json.loads(description.read_text()) | {"tensors_hash": modeldir.params_hash(tensors)}
    description.write_text(json.dumps(config))


def directories(good: Path) -> Iterator[Malformed]:
    """A base and an adapter, either of them damaged or forged, given to ``launch/merge.py``."""
    changes: list[tuple[str, str, Callable[[Path], None]]] = []
    for kind, description, weights, step in (
        ("model", "model/model.json", "model/model.safetensors", 400),
        ("adapter", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", 20),
    ):
        text = (good / description).read_text()
        changes += [(kind, f"{description}: {what}", partial(_write, description, bad)) for what, bad in not_json(text)]
        fields = json.loads(text)
        needed = {name: value for name, value in fields.items()
                  if name not in ("provenance", "scores", "cohort", "parameters", "label_scheme", "regions", "output")
                  or kind == "model" and name in ("regions", "output")}  # fmt: skip
        others = {name: value for name, value in fields.items() if name not in needed}
        changes += [(kind, f"{description}: {what}", partial(_write, description, others | bad))
                    for what, bad in other_types(needed)]  # fmt: skip
        sound = (good / weights).read_bytes()
        forged = forged_tensors(sound, step)
        changes += [(kind, f"{weights}: {what}", partial(_write, weights, bad)) for what, bad in forged]
        for target in ("nowhere", "/dev/null", "/", Path(weights).name):
            changes.append((kind, f"{weights} is a link to {target}", partial(_link, weights, target)))
    config = json.loads((good / "adapter/adapter_config.json").read_text())
    for name in ("scores", "cohort"):
        change = partial(_write, "adapter/adapter_config.json", {key: config[key] for key in config if key != name})
        changes.append(("adapter", f"adapter/adapter_config.json: no {name}", change))
    for options in (
        {"../../elsewhere": {}}, {"os.system": {"command": "touch x"}}, {"__class__": {}}, {"lora": {"rank": 2**40}},
        {"lora": {"rank": -1}}, {"lora": {"targets": "(" * 5000}}, {"head": {"reinit": 1}}, {"head": []},
        {"conv_adapter": {"gamma": 0}}, {"conv_adapter": {"kernel_size": 10**6}}, {"full": {}, "head": {}},
    ):  # fmt: skip
        change = partial(_write, "adapter/adapter_config.json", config | {"options": options})
        changes.append(("adapter", f"options {str(options)[:40]}", change))
    model = json.loads((good / "model/model.json").read_text())
    for kwargs in (
        {"n_channels": 2**40}, {"n_channels": -1}, {"block_counts": [10**9] + [0] * 8}, {"n_classes": 2**40},
        {"block_counts": [1]}, {"kernel_size": 10**6 + 1}, {"exp_r": 10**9}, {"in_channels": 10**12},
        {"n_channels": "2"}, {"n_channels": None}, {"no_such": 1}, {"dtype": "os.system"}, {"n_channels": 1e300},
        {"kernel_size": 0}, {"adapters": [1]}, {"dim": "4d"}, {"name": 5}, {"parent": {}},
    ):  # fmt: skip
        change = partial(_write, "model/model.json", model | {"kwargs": model["kwargs"] | kwargs})
        changes.append(("model", f"network {kwargs}", change))
    for regions in ({}, {"WT": []}, {"WT": [-1]}, {"WT": ["a"]}, {"WT": [10**12]}, {"a": [1], "b": [2]}):
        change = partial(_write, "model/model.json", model | {"regions": regions})
        changes.append(("model", f"regions {regions}", change))
    changes.append(("adapter", "path outside, under its hash", _outside))
    for kind, name, change in changes:
        make = partial(_with, change, good=good)
        yield Malformed(f"{kind} files", name, "merge.py", MERGE, make, told=(f"in/{kind}",))
    for name, flags, told in (
        ("output is a file", (*MERGE[:2], "--output={good}/store/dataset.json"), "store/dataset.json"),
        ("output is something else", (*MERGE[:2], "--output={good}/store"), "/store"),
        ("output below a file", (*MERGE[:2], "--output=/dev/null/merged"), "/dev/null"),
        ("model is an adapter", ("--model={in}/adapter", *MERGE[1:]), "in/adapter"),
        ("adapter is a model", (MERGE[0], "--adapter={in}/model", MERGE[2]), "in/model"),
        ("adapter outside", (MERGE[0], "--adapter={in}/../../../nowhere", MERGE[2]), "nowhere"),
    ):
        make = partial(_with, lambda folder: None, good=good)
        yield Malformed("adapter files", name, "merge.py", flags, make, told=(told,))


class Executed:
    """Unpickled the usual way, it runs a command that leaves a file outside the output."""

    def __init__(self, function: Callable, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _zip(pickled: bytes, names: tuple[str, ...] = ("archive/data.pkl",)) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, pickled)
    return buffer.getvalue()


def _hostile(wrap: Callable[[bytes], bytes], function: Callable, arguments: tuple, folder: Path) -> None:
    place = str(folder / "executed")
    values = [value.format(place) if isinstance(value, str) else value for value in arguments]
    attack = pickle.dumps({"state_dict": Executed(function, *values)}, 2)
    (folder / "x.ckpt").write_bytes(wrap(attack))


def _plain(content: bytes, folder: Path) -> None:
    (folder / "x.ckpt").write_bytes(content)


def torch_files(good: Path) -> Iterator[Malformed]:
    """Checkpoints for ``launch/convert.py``: hostile pickles, cut archives, forged safetensors."""
    flags, told = ("--input={in}/x.ckpt", "--output={out}/model"), ("in/x.ckpt",)
    for name, wrap in {"zip": _zip, "stream": lambda data: data}.items():
        for function, arguments in ((os.system, ("touch {}",)), (os.mkdir, ("{}",)), (exec, ("open({!r}, 'w')",)),
                                    (eval, ("__import__('os').mkdir({!r})",)), (open, ("{}", "w")),
                                    (shutil.copy, ("/etc/hostname", "{}"))):  # fmt: skip
            make = partial(_hostile, wrap, function, arguments)
            yield Malformed("PyTorch files", f"{name} that calls {function.__name__}", "convert.py", flags, make,
                            told=told)  # fmt: skip
    archive = _zip(pickle.dumps({"state_dict": {}}, 2))
    bombs = {
        "zip without data.pkl": _zip(b"", ("archive/x",)), "path outside": _zip(b"x", ("../../elsewhere", "/etc/x")),
        "TorchScript": _zip(b"", ("archive/data.pkl", "archive/constants.pkl")), "empty": b"", "text": b"hello",
        "pickle without an end": b"\x80\x02" + b"(" * 10_000, "memo of 2**31": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "string of 2**31": b"\x80\x02X\xff\xff\xff\x7fabc.", "tuples nested": b"\x80\x02)" + b"\x85" * 200_000 + b".",
        "long of 2**31 bytes": b"\x80\x02\x8b\xff\xff\xff\x7f.", "LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
        "empty state": archive, "frame of 2**60": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.",
    }  # fmt: skip
    for name, content in bombs.items():
        yield Malformed("PyTorch files", name, "convert.py", flags, partial(_plain, content), told=told)
    for cut in range(1, len(archive), 10):
        yield Malformed("PyTorch files", f"zip cut at byte {cut}", "convert.py", flags, partial(_plain, archive[:cut]),
                        told=told)  # fmt: skip
    for name, content in forged_tensors((good / "adapter/adapter_model.safetensors").read_bytes(), 40):
        make = partial(_plain, content)
        yield Malformed("PyTorch files", f"safetensors: {name}", "convert.py", flags, make, told=told)
