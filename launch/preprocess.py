r"""Checks a folder of BraTS cases and makes a store of it.

    python launch/preprocess.py --input=DIR --check-only [--report=problems.json]
    python launch/preprocess.py --input=DIR --output=STORE
    python launch/preprocess.py --input=DIR --output=STORE --splits=splits_final.json --skip-bad

Names as downloaded: BraTS2021_00000_{flair,t1,t1ce,t2,seg} or BraTS-SSA-00002-000-{t1n,t1c,t2w,t2f,seg},
.nii or .nii.gz, at any depth, with or without segmentations. Stopped in the middle, the same command goes on.
"""

import command
from absl import flags

from data_pipeline import atomic, integrity, labels, normalization, preprocess

INPUT = flags.DEFINE_string("input", None, "Folder with the cases, at any depth.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Folder of the store.")
CHECK_ONLY = flags.DEFINE_bool("check_only", False, "Report the problems of all cases, write no store.")
REPORT = flags.DEFINE_string("report", None, "With --check-only: write the problems as JSON to this file.")
WORKERS = flags.DEFINE_integer("workers", None, "Processes; default: one per core.", lower_bound=1)
LABEL_MAP = flags.DEFINE_string("label_map", "", "Label values to map, as VALUE:LABEL,... such as 4:0.")
NORMALIZATION = flags.DEFINE_enum(
    "normalization", normalization.DEFAULT, list(normalization.NORMALIZATIONS), "How intensities are normalised."
)
SPLITS = flags.DEFINE_string("splits", None, "JSON with your own splits, or nnU-Net's splits_final.json.")
VAL_FRACTION = flags.DEFINE_float("val_fraction", 0.2, "Part of the patients for validation.")
TEST_FRACTION = flags.DEFINE_float("test_fraction", 0.0, "Part of the patients for testing.")
FOLDS = flags.DEFINE_integer("folds", None, "Folds for cross-validation; 0: none; default: 5, fewer in tiny cohorts.")
SEED = flags.DEFINE_integer("seed", 0, "Decides the splits.", lower_bound=0)
SKIP_BAD = flags.DEFINE_bool("skip_bad", False, "Leave cases with problems out instead of stopping.")


def check() -> int:
    """Prints every problem; 1 if there is any that is more than a warning."""
    label_map = labels.parse_label_map(LABEL_MAP.value)
    problems = integrity.check(INPUT.value, label_map=label_map, workers=WORKERS.value)
    if REPORT.value:
        atomic.write_json(REPORT.value, [vars(problem) for problem in problems])
    for problem in problems:
        print(f"{'warning: ' if problem.warning else ''}{problem}")
    serious = sum(not problem.warning for problem in problems)
    warnings = len(problems) - serious
    print(f"{serious} problem{'s' * (serious != 1)}, {warnings} warning{'s' * (warnings != 1)}")
    return 1 if serious else 0


def main(_) -> int:
    """Makes or checks a store; returns the exit code, 1 if there are problems."""
    if CHECK_ONLY.value:
        return check()
    if not OUTPUT.value:
        raise ValueError("no --output: give --output=STORE, or --check-only to look without writing")
    if REPORT.value:
        raise ValueError("--report goes with --check-only")
    made = preprocess.preprocess(
        INPUT.value,
        OUTPUT.value,
        workers=WORKERS.value,
        seed=SEED.value,
        val_fraction=VAL_FRACTION.value,
        test_fraction=TEST_FRACTION.value,
        folds=FOLDS.value,
        splits=SPLITS.value,
        label_map=labels.parse_label_map(LABEL_MAP.value),
        skip_bad=SKIP_BAD.value,
        normalization=NORMALIZATION.value,
    )
    sizes = ", ".join(f"{name} {len(part)}" for name, part in made.splits.items() if isinstance(part, list))
    folds = sum(isinstance(part, dict) for part in made.splits.values())
    print(f"{made.path}: {len(made.case_ids)} cases ({sizes}, {folds} folds)")
    return 0


if __name__ == "__main__":
    command.run(main)
