r"""Segments cases with a trained model: one label map per case, in the case's own space, header and label scheme.

    python launch/predict.py --model=runs/pretrain --input=DATA/BraTS-Africa --output=predictions
    python launch/predict.py --model=runs/pretrain --adapter=runs/peft/adapter --input=CASES --output=OUT --flips
    python launch/predict.py --model=FOLD0,FOLD1,FOLD2 --input=CASES --output=OUT --thresholds=WT:0.5,TC:0.7,ET:0.7

--input is a folder of raw cases, as for launch/preprocess.py, or a store. Stopped in the middle, the same command
goes on; cases whose scans changed since are predicted again. A case that cannot be read is reported and the others are
done; the exit code is then 1.
For research only; not a medical device.
"""

import dataclasses
import platform
import sys
from pathlib import Path

import command
import numpy as np
from absl import flags

MODEL = flags.DEFINE_list("model", None, "Model directories or training workdirs; several are averaged.", required=True)
ADAPTER = flags.DEFINE_list("adapter", [], "Adapter of the model; one per model, or several of one model.")
FORCE = flags.DEFINE_bool("force", False, "Put the adapter on another base than the one it was trained on.")
INPUT = flags.DEFINE_string("input", None, "Folder of raw cases at any depth, or a store.", required=True)
SPLIT = flags.DEFINE_string("split", "", "Only the cases of this split of a store, such as test.")
OUTPUT = flags.DEFINE_string("output", None, "Folder for the label maps.", required=True)
PATCH_VOXELS = flags.DEFINE_list("patch_voxels", None, "Window as D,H,W; default: the model's training patch.")
OVERLAP = flags.DEFINE_float("overlap", 0.5, "Share of a window that its neighbour covers.", 0, 0.95)
FLIPS = flags.DEFINE_bool("flips", False, "Average over the eight mirror images: eight times the work.")
WINDOWS_PER_BATCH = flags.DEFINE_integer("windows_per_batch", 1, "Windows computed at once.", lower_bound=1)
ACCUMULATE = flags.DEFINE_enum("accumulate", "auto", ["auto", "device", "host"], "Where the sums of windows lie.")
DTYPE = flags.DEFINE_enum("dtype", "auto", ["auto", "float32", "bfloat16"], "Compute type; auto: by device.")
THRESHOLDS = flags.DEFINE_list("thresholds", [], "0.5 for all, or by region: WT:0.5,TC:0.7,ET:0.7.")
MIN_COMPONENT_MM3 = flags.DEFINE_list("min_component_mm3", [], "Remove smaller components: 50, or ET:50,...")
MIN_TOTAL_MM3 = flags.DEFINE_list("min_total_mm3", [], "Remove a region smaller than this in all: ET:200,...")
LABEL_SCHEME = flags.DEFINE_enum(
    "label_scheme", "input", ["input", "brats2021", "brats2023"], "Values in the label maps; input: the case's own."
)
SAVE_PROBABILITIES = flags.DEFINE_bool("save_probabilities", False, "Write probabilities/<case>.npz too.")
SKIP_EXISTING = flags.DEFINE_bool("skip_existing", True, "Keep label maps that are there; else replace them.")


def pairs(models: list[str], adapters: list[str]) -> list[tuple[str, str | None]]:
    """(model, adapter or None) of each member of the ensemble."""
    if not adapters:
        return [(model, None) for model in models]
    if len(models) == 1:
        return [(models[0], adapter) for adapter in adapters]
    if len(models) != len(adapters):
        raise ValueError(f"--adapter names {len(adapters)} adapters for {len(models)} models; give one per model")
    return list(zip(models, adapters, strict=True))


def sizes(text: list[str] | None) -> tuple[int, ...] | None:
    """Reads --patch_voxels."""
    if not text:
        return None
    if len(text) != 3 or not all(size.isdecimal() and int(size) and int(size) % 16 == 0 for size in text):
        raise ValueError(f"--patch_voxels={','.join(text)}: give three sizes divisible by 16, like 128,128,128")
    return tuple(int(size) for size in text)


def main(_) -> int:
    """Segments every case of --input; returns the exit code, 1 if a case failed."""
    patch = sizes(PATCH_VOXELS.value)
    import jax  # only now: it reads the compilation cache's place when it is imported
    import prediction

    from data_pipeline import atomic
    from mednext_jax.infer import ensemble
    from mednext_jax.infer.postprocess import PostProcess, by_region
    from mednext_jax.modeldir import params_hash

    prediction.check_output(INPUT.value, OUTPUT.value)
    members = [ensemble.load_member(*pair, DTYPE.value, FORCE.value) for pair in pairs(MODEL.value, ADAPTER.value)]
    jobs, failed = prediction.find_jobs(INPUT.value, members[0].info.normalization, SPLIT.value)
    window = {"patch_voxels": patch, "overlap": OVERLAP.value, "flips": FLIPS.value}
    predictor = ensemble.Ensemble(
        members, windows_per_batch=WINDOWS_PER_BATCH.value, accumulate=ACCUMULATE.value, **window
    )
    prediction.check_data(predictor.info, INPUT.value)
    regions = list(predictor.info.regions)
    rules = PostProcess(
        by_region("--thresholds", THRESHOLDS.value, regions),
        by_region("--min_component_mm3", MIN_COMPONENT_MM3.value, regions),
        by_region("--min_total_mm3", MIN_TOTAL_MM3.value, regions),
    )
    rules.check(predictor.info.regions)
    options = prediction.Options(rules, LABEL_SCHEME.value, SAVE_PROBABILITIES.value)
    record = {
        "models": [params_hash(member.params) for member in members],
        "options": {**window, "dtype": ensemble.compute_dtype(DTYPE.value), **dataclasses.asdict(options)},
        "sources": [member.source for member in members],
        "input": INPUT.value,
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__},
    }
    prediction.begin(OUTPUT.value, record, jobs, keep=SKIP_EXISTING.value)
    for case_id, reason in failed.items():
        is_there = prediction.label_map_file(Path(OUTPUT.value), case_id).exists()
        stays = "; its earlier label map stays" if is_there else ""
        print(f"failed: {case_id}: {reason.removeprefix(f'{case_id}: ')}{stays}", file=sys.stderr)
    failed_later = prediction.predict_cases(jobs, predictor, OUTPUT.value, options)
    done = len(jobs) - len(failed_later)
    failed |= failed_later
    atomic.write_json(Path(OUTPUT.value, prediction.RECORD_FILE), {**record, "failed": failed})
    print(f"{OUTPUT.value}: {done} label maps, {len(failed)} cases failed")
    return 1 if failed else 0


if __name__ == "__main__":
    command.run(main)
