r"""Simulate two glioma cohorts on the MNI152 anatomy (needs the extra `demo`).

    python launch/simulate.py --output=data/simulated                       3 mm, 96 + 58 cases
    python launch/simulate.py --output=data/full --spacing_mm=1 --source_cases=4 --target_cases=2
    python launch/simulate.py --montage=cohorts.png --spacing_mm=1          only a picture of both cohorts

`source/` has the layout of BraTS-2021, `target/` that of BraTS-SSA (low field, thick slices, late and large
tumours). Running it again goes on where it stopped. The images are simulated: no patient was scanned.
"""

from pathlib import Path

import command
from absl import flags

from data_pipeline import atomic, simulate

OUTPUT = flags.DEFINE_string("output", None, "Folder that gets source/ and target/, e.g. data/simulated.")
WHICH = flags.DEFINE_enum("which", "both", ["both", "source", "target"], "Which cohorts.")
SOURCE_CASES = flags.DEFINE_integer("source_cases", 96, "Cases of the source cohort.", lower_bound=0)
TARGET_CASES = flags.DEFINE_integer("target_cases", 58, "Cases of the target cohort.", lower_bound=0)
SPACING_MM = flags.DEFINE_float("spacing_mm", 3.0, "Voxel edge; 1 is the full 240x240x155 grid.")
SEED = flags.DEFINE_integer("seed", 0, "Same seed and spacing: same files.", lower_bound=0)
WORKERS = flags.DEFINE_integer(
    "workers", None, "Processes; default: one per core. Each takes 0.7 GB at 3 mm, 1.2 GB at 1 mm.", lower_bound=1
)
MONTAGE = flags.DEFINE_string("montage", None, "PNG of two cases per cohort (axial); needs no --output.")


def draw(path: str) -> None:
    """Writes the picture: the first two cases of each chosen cohort."""
    names = ["source", "target"] if WHICH.value == "both" else [WHICH.value]
    cases = []
    for name in names:
        recipe = simulate.RECIPES[name]
        for index in range(2):
            seed = simulate.case_seed(SEED.value, recipe, index)
            case = simulate.simulate_case(recipe, seed, SPACING_MM.value)
            cases.append((f"{name} {index + 1}", case))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(path, simulate.montage(cases, views=("axial",)))
    print(path)


def main(_) -> None:
    """Writes the simulated cohort, its picture, or both."""
    if not (OUTPUT.value or MONTAGE.value):
        raise ValueError("nothing to do: give --output=FOLDER for cohorts or --montage=FILE.png for a picture")
    if OUTPUT.value:
        folders = simulate.simulate(
            OUTPUT.value,
            source_cases=SOURCE_CASES.value if WHICH.value != "target" else 0,
            target_cases=TARGET_CASES.value if WHICH.value != "source" else 0,
            spacing_mm=SPACING_MM.value,
            seed=SEED.value,
            workers=WORKERS.value,
        )
        for folder in folders:
            print(folder)
    if MONTAGE.value:
        draw(MONTAGE.value)


if __name__ == "__main__":
    command.run(main)
