"""Malformed NIfTI files and folders of cases, for ``launch/preprocess.py``."""

import gzip
import os
import random
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np

from data_pipeline.cohorts import CHANNELS
from tests.faults.fuzz import Malformed

CASE = "BraTS-SSA-00001-000"
SHAPE = (9, 8, 7)
PREPROCESS = ("--input={in}", "--output={out}/store", "--workers=1")
NAN, INF = float("nan"), float("inf")
BOMB_BYTES = 200 << 20

# field of a NIfTI-1 header -> values that no image has
HEADERS: dict[str, tuple] = {
    "dim": ((0, 9, 8, 7), (1, 9), (2, 9, 8), (3, -1, 8, 7), (3, 0, 8, 7), (3, 9, 8, 0), (-3, 9, 8, 7), (9, 9, 8, 7),
            (4, 9, 8, 7, 2), (7, 9, 8, 7, 2, 2, 2, 2), (3, 9, 8, 8), (3, 32767, 32767, 32767), (3, 30000, 30000, 1),
            (3, 640, 640, 640), (5, 32767, 32767, 32767, 32767, 32767)),
    "datatype": (0, 1, 32, 128, 1536, 1792, 2048, 2304, -1, 9999),
    "vox_offset": (-352.0, NAN, INF, 1e30, 349.0, 1e7, 353.0, 4e9),
    "magic": (b"ni1", b"xxxx", b"", b"n+2"),
    "sizeof_hdr": (0, 349, 540, 2**31 - 1, -348),
    "scl_slope": (INF, 1e38), "scl_inter": (INF, NAN),
    "pixdim": ((1, 0, 0, 0), (1, NAN, 1, 1), (1, INF, 1, 1), (1, 1, 1, NAN)),
    "srow_x": ((0, 0, 0, 0), (NAN, 0, 0, 0), (INF, 0, 0, 0), (1e-30, 0, 0, 0), (0, 1, 0, 0)),
    "srow_z": ((0, 1, 0, 0), (0, 0, NAN, 0), (0, 0, 1, NAN), (0, 0, 1e38, 1e38)),
}  # fmt: skip
MAY_PASS = {"scl_slope", "scl_inter", "pixdim", "magic"}  # the sform counts, not pixdim; Inf is told as such


def image(seed: int = 0, **fields) -> bytes:
    """A small .nii; ``fields`` of its header are overwritten."""
    voxels = np.random.default_rng(seed).integers(1, 500, SHAPE).astype(np.int16)
    voxels[:2] = 0
    data = bytearray(nib.Nifti1Image(voxels, np.diag([-1.0, -1, 1, 1])).to_bytes())
    header = np.frombuffer(data, nib.Nifti1Header.template_dtype, 1)
    for name, value in fields.items():
        if isinstance(value, tuple):
            header[name][0][: len(value)] = value
        else:
            header[name] = value
    return bytes(data)


def write_case(
    folder: Path, bad: bytes | None = None, suffix: str = ".nii.gz", case: str = CASE, skip: str = ""
) -> None:
    """A case below ``folder``, its t1c being ``bad``; without it the case is sound."""
    place = folder / case
    place.mkdir(parents=True, exist_ok=True)
    for number, channel in enumerate(CHANNELS):
        if channel == skip:
            continue
        good = image(number)
        if channel == "t1c" and bad is not None:
            (place / f"{case}-{channel}{suffix}").write_bytes(bad)
        else:
            (place / f"{case}-{channel}.nii.gz").write_bytes(gzip.compress(good, 1))
    label = np.zeros(SHAPE, np.uint8)
    label[4:6, 4:6, 4:6] = [[[1, 2], [3, 1]]]
    seg = nib.Nifti1Image(label, np.diag([-1.0, -1, 1, 1])).to_bytes()
    (place / f"{case}-seg.nii.gz").write_bytes(gzip.compress(seg, 1))


def _file(name: str, bad: bytes, suffix: str = ".nii.gz", harmless: bool = False) -> Malformed:
    make = partial(write_case, bad=bad, suffix=suffix)
    return Malformed("NIfTI reader", name, "preprocess.py", PREPROCESS, make, harmless, told=(CASE,))


def nifti() -> Iterator[Malformed]:
    """Truncations at every 10th byte, headers that lie, files that are something else."""
    plain = image()
    packed = gzip.compress(plain, 6)
    for suffix, whole in ((".nii", plain), (".nii.gz", packed)):
        for cut in range(0, len(whole), 10):
            yield _file(f"{suffix} cut at byte {cut}", whole[:cut], suffix)
    for name, values in HEADERS.items():
        for number, value in enumerate(values):
            bad = image(**{name: value})
            suffix, content = ((".nii", bad), (".nii.gz", gzip.compress(bad, 1)))[number % 2]
            yield _file(f"{suffix} {name} {value}", content, suffix, name in MAY_PASS)
    for seed in range(40):
        rng = random.Random(seed)
        noisy = bytearray(plain)
        for _ in range(rng.randint(1, 12)):
            noisy[rng.randrange(352)] = rng.randrange(256)
        yield _file(f"noise {seed} in the header", bytes(noisy), ".nii", harmless=True)
    wide = nib.Nifti2Image(np.zeros(SHAPE, np.int16), np.eye(4)).to_bytes()
    for size in (2**31, 2**40, 2**62, -1):
        bad = bytearray(wide)
        np.frombuffer(bad, nib.Nifti2Header.template_dtype, 1)["dim"][0][:4] = (3, size, size, size)
        yield _file(f"NIfTI-2 of {size} cubed", bytes(bad), ".nii")
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 4
    others = {
        "text": b"hello", "JSON": b"{}", "PNG": b"\x89PNG\r\n\x1a\n" + bytes(600), "zeros": bytes(4000),
        "empty gzip": gzip.compress(b""), "gzip twice": gzip.compress(packed), "gzip flipped": bytes(flipped),
        "gzip without its checksum": packed[:-8], "gzip bomb": gzip.compress(plain + bytes(BOMB_BYTES), 9),
    }  # fmt: skip
    for name, content in others.items():
        yield _file(name, content)
    yield _file("size of the header in the other byte order", plain[3::-1] + plain[4:], harmless=True)


def _scan(name: str, make: Callable[[Path], None], harmless: bool = False) -> Malformed:
    return Malformed("scanner", name, "preprocess.py", PREPROCESS, make, harmless, told=("/in", CASE))


def _special(kind: str, folder: Path) -> None:
    """A case whose t1c is no regular file."""
    write_case(folder, skip="t1c")
    place = folder / CASE / f"{CASE}-t1c.nii.gz"
    targets = {"dangling": "nowhere", "itself": place.name, "zeros": "/dev/zero", "memory": "/proc/self/mem",
               "terminal": "/dev/tty", "root": "/"}  # fmt: skip
    if kind in targets:
        place.symlink_to(targets[kind])
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as server:
            here = os.getcwd()
            os.chdir(place.parent)  # the name of a socket may not be long
            server.bind(place.name)
            os.chdir(here)


def _loops(folder: Path, sound: bool) -> None:
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "up").symlink_to(folder, target_is_directory=True)
    (folder / "a" / "self").symlink_to(folder / "a", target_is_directory=True)
    (folder / "x").symlink_to(folder / "y")
    (folder / "y").symlink_to(folder / "x")
    if sound:
        write_case(folder)
        write_case(folder / "a", case="BraTS-SSA-00002-000")


def _named(folder: Path, name: str, inside: bool = False) -> None:
    """Two cases in a folder of that name; or the name as that of a file of a case."""
    place = folder if inside else folder / name
    write_case(place)
    write_case(place, case="BraTS-SSA-00002-000")
    if inside:
        (place / CASE / f"{CASE}-t1c.nii.gz").rename(place / CASE / name)


def scanner() -> Iterator[Malformed]:
    """Loops of links, files that are none, names of every kind."""
    yield _scan("loops of links and no case", partial(_loops, sound=False))
    yield _scan("loops of links beside cases", partial(_loops, sound=True), harmless=True)
    for kind in ("dangling", "itself", "zeros", "memory", "terminal", "root", "pipe", "folder", "socket"):
        yield _scan(f"image is {kind}", partial(_special, kind))
    for channel in CHANNELS:
        yield _scan(f"no {channel}", partial(write_case, skip=channel))
    yield _scan("empty folder", lambda folder: None)
    for name in ("with space", "ünïcödé 脑", "new\nline", "tab\there", "-dash", "'quote\"", "$(touch x)", "{0}", "%s",
                 "\udcff\udcfe", "a" * 200):  # fmt: skip
        yield _scan(f"folder named {name[:20]!r}", partial(_named, name=name), harmless=True)
    for name in (
        "..-t1c.nii.gz", f"{CASE} (1)-t1c.nii.gz", f"{CASE}-T1C.nii.gz", f"{CASE}-t1c.nii.bz2", "-t1c.nii.gz",
        f"..{CASE}-t1c.nii.gz", "\udcff-t1c.nii.gz", f"{CASE}-t1c.nii.gz.nii", f"%2e%2e%2f{CASE}-t1c.nii",
    ):  # fmt: skip
        yield _scan(f"image named {name!r}", partial(_named, name=name, inside=True))

    def twice(folder: Path) -> None:
        write_case(folder / "one")
        write_case(folder / "two")

    def deep(folder: Path) -> None:
        place = folder.joinpath(*["d"] * 150)
        write_case(place, skip="t2f")

    yield _scan("the same case twice", twice)
    yield _scan("half a case 150 folders down", deep)
    for name, flags in (
        ("input is a file", ("--input={good}/store/dataset.json", *PREPROCESS[1:])),
        ("input is not there", ("--input={in}/no/such", *PREPROCESS[1:])),
        ("input is a pipe", ("--input=/dev/null", *PREPROCESS[1:])),
        ("output is a file", ("--input={good}/raw", "--output={good}/store/dataset.json", "--workers=1")),
        ("output is below a file", ("--input={good}/raw", "--output={good}/store/dataset.json/x", "--workers=1")),
        ("output is the name of no folder", ("--input={good}/raw", "--output=/dev/null/x", "--workers=1")),
        ("output name too long", ("--input={good}/raw", "--output={out}/" + "x" * 300, "--workers=1")),
    ):
        place = flags[0] if "input" in name else flags[1]
        yield Malformed("scanner", name, "preprocess.py", flags, told=(place.rpartition("}")[2].rpartition("=")[2],))
