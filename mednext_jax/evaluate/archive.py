"""Opens a finished evaluation again (table, lesions, folders) for notebooks and further comparisons."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path

from mednext_jax.evaluate import cohort, measure
from mednext_jax.evaluate.lesionwise import Lesion
from mednext_jax.evaluate.tables import LESION_COLUMNS, read_table


def load(folder: str | Path) -> cohort.Evaluation:
    """Reads what the evaluate command wrote and inspects the label files it was made from.

    Raises:
      FileNotFoundError: the folder holds no evaluation, or label files have moved.
      ValueError: a label file is no longer the one that was measured (its SHA-256 differs).
    """
    folder = Path(folder)
    summary = folder / "summary.json"
    if not summary.is_file():
        raise FileNotFoundError(f"{summary}: no such file; make it with launch/evaluate.py --output={folder}")
    content = json.loads(summary.read_text(encoding="utf-8"))
    settings = content["settings"]
    folders = {
        name: _folder(name, entry, content["sha256"][name])
        for name, entry in {"references": content["references"], **content["runs"]}.items()
    }
    return cohort.Evaluation(
        settings=measure.Settings(
            {name: tuple(values) for name, values in settings["regions"].items()},
            settings["challenge"],
            tuple(settings["tolerances_mm"]),
            settings["absent_regions"]["policy"],
        ),
        references=folders.pop("references"),
        arms=tuple(folders.values()),
        table=read_table(folder / "metrics.csv"),
        lesions=read_lesions(folder / "lesions.csv"),
        missing={name: tuple(entry["missing"]) for name, entry in content["runs"].items()},
        extra={name: tuple(entry["extra"]) for name, entry in content["runs"].items()},
    )


def read_lesions(path: str | Path) -> dict[tuple[str, str, str], tuple[Lesion, ...]]:
    """(run, case, region) to the lesion table, as `tables.write_lesions` wrote it."""
    found: dict[tuple[str, str, str], list[Lesion]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        if tuple(next(reader, ())) != LESION_COLUMNS:
            raise ValueError(f"{path}: the first line must be {','.join(LESION_COLUMNS)}")
        for run, case, region, kind, *numbers, centre in reader:
            lesion = Lesion(kind, *map(float, numbers), tuple(map(int, centre.split())))
            found.setdefault((run, case, region), []).append(lesion)
    return {key: tuple(lesions) for key, lesions in found.items()}


def _folder(name: str, entry: Mapping, hashes: Mapping[str, str]) -> cohort.Folder:
    opened = cohort.open_folder(name, entry["path"])
    for case, expected in hashes.items():
        if case not in opened.inspections:
            raise FileNotFoundError(f"{name}: case {case} is no longer in {entry['path']}; evaluate again")
        if opened.inspections[case].sha256 != expected:
            raise ValueError(f"{opened.files[case]} is not the file that was measured; evaluate again")
    if entry["relabel"] is None:
        return opened
    relabel = {int(value): label for value, label in entry["relabel"].items()}
    return cohort.relabelled(opened, entry["label_scheme"], relabel)
