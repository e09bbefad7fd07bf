"""Finds BraTS cases in a folder as downloaded: names, modalities, time points, and what is wrong with them.

Two naming schemes are known, at any depth, as ``.nii`` or ``.nii.gz``:

* ``brats2021`` (2018 to 2021): ``BraTS2021_00000_{flair,t1,t1ce,t2,seg}``, ``BraTS20_Training_001_flair``;
* ``brats2023`` (2023 and later): ``BraTS-SSA-00002-000-{t1n,t1c,t2w,t2f,seg}`` with any cohort code; the
  number after the patient's is the time point, so ``BraTS-GLI-00005-000`` and ``-001`` are one patient.

Channels go by name, never by position: ``CHANNELS`` is the one order.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

CHANNELS = ("t1n", "t1c", "t2w", "t2f")
SEGMENTATION = "seg"
EXAMPLES = "BraTS2021_00000_flair.nii.gz or BraTS-SSA-00002-000-t2f.nii.gz"

_OLD_SUFFIXES = {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f", "seg": SEGMENTATION}
_OLD_NAME = re.compile(
    r"(?P<case>(?:BraTS|Brats|BRATS)\d{2,4}(?:[_-][A-Za-z0-9]+)+?)_(?P<suffix>t1|t1ce|t2|flair|seg)\.nii(?:\.gz)?"
)
_NEW_NAME = re.compile(
    r"(?P<case>(?P<patient>(?:BraTS|BRATS)-[A-Za-z]{2,6}-\d{1,8})(?:-\d{1,4})?)-(?P<suffix>t1n|t1c|t2w|t2f|seg)\.nii(?:\.gz)?"
)
_EXTENSION = re.compile(r"\.nii(?:\.gz)?$", re.IGNORECASE)
_IGNORED_FOLDERS = frozenset({"__MACOSX"})


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a case or a file.

    Attributes:
      case_id: the case, or "" for a file that belongs to none.
      kind: short stable name, such as ``missing modality``.
      message: one line that names the file and what to do.
      warning: worth a look, but nothing stops.
    """

    case_id: str
    kind: str
    message: str
    warning: bool = False

    def __str__(self) -> str:
        return f"{self.case_id + ': ' if self.case_id else ''}{self.kind}: {self.message}"


@dataclass(frozen=True)
class Case:
    """One examination of one patient.

    Attributes:
      case_id: the name without modality, unique in a cohort and safe as a folder name.
      patient_id: equal for all time points of a patient; splits never separate them.
      images: {channel: file} in the order of ``CHANNELS``.
      segmentation: label file, or None (validation cases).
      naming: ``brats2021`` or ``brats2023``; says which label scheme the file should have.
    """

    case_id: str
    patient_id: str
    images: dict[str, Path]
    segmentation: Path | None
    naming: str


@dataclass(frozen=True)
class FileName:
    """What a file name says: case, patient, naming, and the channel or ``seg``."""

    case_id: str
    patient_id: str
    content: str
    naming: str


@dataclass
class _Found:
    name: FileName
    files: dict[str, list[Path]] = field(default_factory=dict)


def parse_name(name: str) -> FileName | None:
    """Reads a file name (without folder); None if it fits no scheme."""
    if match := _NEW_NAME.fullmatch(name):
        return FileName(match["case"], match["patient"], match["suffix"], "brats2023")
    if match := _OLD_NAME.fullmatch(name):
        return FileName(match["case"], match["case"], _OLD_SUFFIXES[match["suffix"]], "brats2021")
    return None


def scan(folder: str | Path) -> list[Case]:
    """All cases below ``folder``, ordered by case id, each with its four modalities.

    NIfTI files whose name fits no scheme are passed over; ``survey`` reports them.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: no case in it, a case without one of the modalities, or a case that is there twice.
    """
    cases, problems = survey(folder)
    serious = [problem for problem in problems if problem.case_id]
    if serious:
        more = f" (and {len(serious) - 1} more problems)" if len(serious) > 1 else ""
        raise ValueError(f"{serious[0]}{more}; see all with launch/preprocess.py --check_only")
    if not cases:
        raise ValueError(f"{shown(folder)}: no BraTS case found; files must be named like {EXAMPLES}")
    return cases


def survey(folder: str | Path) -> tuple[list[Case], list[Problem]]:
    """All usable cases below ``folder`` and every problem that names and files show without being opened.

    A case with a missing modality or with two files for one modality is left out and reported.

    Raises:
      FileNotFoundError: no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file; give the folder that holds the cases" if folder.exists() else "no such folder"
        raise FileNotFoundError(f"{shown(folder)}: {what}")
    problems: list[Problem] = []
    found: dict[str, _Found] = {}
    for path in _nifti_files(folder, problems):
        # Some archives unpack into a folder per file that keeps the good name: case_t1.nii/0057_brain.nii
        name = parse_name(path.name) or parse_name(path.parent.name)
        if name is None:
            text = f"{shown(path)} fits no naming scheme; rename it like {EXAMPLES}, or take it away"
            problems.append(Problem("", "unknown name", text))
            continue
        entry = found.setdefault(name.case_id, _Found(name))
        same = entry.files.setdefault(name.content, [])
        if os.path.realpath(path) not in map(os.path.realpath, same):  # a link to a file is no second file
            same.append(path)
    cases = []
    for case_id in sorted(found):
        case, faults = _assemble(found[case_id])
        problems += faults
        if case is not None:
            cases.append(case)
    return cases, problems


def shown(path: str | Path) -> str:
    """A path as one printable line: undecodable bytes and control characters are escaped."""
    text = str(path).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _assemble(found: _Found) -> tuple[Case | None, list[Problem]]:
    """Builds the case from its files, or says what keeps it from being one."""
    name, problems = found.name, []
    for content, paths in found.files.items():
        if len(paths) > 1:
            listed = " and ".join(shown(path) for path in paths)
            text = f"{content} is there {len(paths)} times: {listed}; keep one"
            problems.append(Problem(name.case_id, "duplicate case", text))
    missing = [channel for channel in CHANNELS if channel not in found.files]
    if missing:
        where = shown(next(iter(found.files.values()))[0].parent)
        text = f"no {', '.join(missing)} in {where}; every case needs {', '.join(CHANNELS)}"
        problems.append(Problem(name.case_id, "missing modality", text))
    if problems:
        return None, problems
    images = {channel: found.files[channel][0] for channel in CHANNELS}
    segmentation = found.files.get(SEGMENTATION, [None])[0]
    return Case(name.case_id, name.patient_id, images, segmentation, name.naming), []


def _nifti_files(folder: Path, problems: list[Problem]) -> Iterator[Path]:
    """NIfTI files below ``folder`` in a stable order, each real folder once.

    Links are followed, since cohorts are often put together by links; a loop ends at a folder already seen.
    """
    seen: set[str] = set()

    def report(error: OSError) -> None:
        text = f"{shown(error.filename)} cannot be listed: {error.strerror}"
        problems.append(Problem("", "unreadable folder", text))

    for root, folders, files in os.walk(folder, followlinks=True, onerror=report):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n not in _IGNORED_FOLDERS)
        for name in sorted(files):
            if not name.startswith(".") and _EXTENSION.search(name):
                yield Path(root, name)
