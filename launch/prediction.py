"""Cases in, label maps out: each in its own space, header and label scheme; stopped, it goes on where it was."""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import command
import jax
import numpy as np
from tqdm import tqdm

from data_pipeline import atomic, cohorts, fingerprints, labels, nifti, preprocess, progress, store_files
from data_pipeline.normalization import DEFAULT, NORMALIZATIONS
from data_pipeline.store import Store
from mednext_jax import modeldir
from mednext_jax.infer.postprocess import PostProcess

RECORD_FILE = "prediction.json"
INPUTS_FILE = "inputs.json"  # of each case, what its files were when they were predicted from
PROBABILITIES_FOLDER = "probabilities"
LABEL_SCHEMES = ("input", *labels.SCHEMES)
CASE_ERRORS = (ValueError, OSError, MemoryError, jax.errors.JaxRuntimeError)
IDENTITY = ("models", "options")  # entries of the record that make predictions comparable

Loaded = tuple[np.ndarray, Mapping[str, Any]]


class Job(NamedTuple):
    """One case to predict: its name, how to get its normalised image (D, H, W, C) and its record, and from which files
    they come."""

    case_id: str
    load: Callable[[], Loaded]
    files: Mapping[str, Path]


class Predictor(Protocol):
    """What turns an image into probabilities: an ``Ensemble``, or anything of its form."""

    info: modeldir.ModelInfo

    def predict(self, image: np.ndarray, progress: Callable[[int, int], None] | None = None) -> np.ndarray:
        """(D, H, W, C) float32 -> (D, H, W, K) float32."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is done with the probabilities.

    Attributes:
      rules: thresholds and clean-up.
      label_scheme: of the files written; "input" is the one of the case's own naming.
      save_probabilities: also write ``probabilities/<case_id>.npz``: float16, in the case's own space.
    """

    rules: PostProcess = PostProcess()
    label_scheme: str = "input"
    save_probabilities: bool = False


def find_jobs(
    path: str | Path, normalization: str = DEFAULT, split: str = ""
) -> tuple[list[Job], dict[str, str]]:
    """The cases of a store or of a folder of raw cases, and {case id or file: problem} of what cannot be used.

    Args:
      normalization: of raw cases, by name: the model's.
      split: only these cases of a store.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: no case in it, or an unknown normalisation.
    """
    if (Path(path) / "dataset.json").is_file():
        store = Store(path)
        chosen = store.split(split) if split else store.case_ids
        files = [{"case.json": store_files.case_folder(path, case_id) / "case.json"} for case_id in chosen]
        loads = [functools.partial(_from_store, store, case_id) for case_id in chosen]
        return [Job(*one) for one in zip(chosen, loads, files, strict=True)], {}
    if split:
        raise ValueError(f"{cohorts.shown(path)} is no store, and --split={split} names a split of one")
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"the model expects intensities normalised by {normalization!r}; known for raw cases: "
                         f"{', '.join(NORMALIZATIONS)}; preprocess them yourself and give a store as --input")
    cases, problems = cohorts.survey(path)
    # A file whose name says nothing may be a patient's: it is no less a failure than a case that cannot be read.
    bad = {p.case_id or p.message: f"{p.kind}: {p.message}" if p.case_id else p.kind for p in problems if not p.warning}
    if not cases and not bad:
        raise ValueError(f"{cohorts.shown(path)}: no case found; files must be named like {cohorts.EXAMPLES}")
    load = functools.partial(preprocess.load_for_prediction, normalization=normalization)
    return [Job(case.case_id, functools.partial(load, case), case.images) for case in cases], bad


def check_output(path: str | Path, output: str | Path) -> None:
    """Raise ValueError if one folder holds the cases and the label maps, where each would pass for the other."""
    cases, label_maps = Path(path).resolve(), Path(output).resolve()
    if label_maps.is_relative_to(cases) or cases.is_relative_to(label_maps):
        raise ValueError(f"--output={output} and --input={path} lie in each other: label maps beside scans would later "
                         "be taken for the cases' own; give a folder apart")


def check_data(info: modeldir.ModelInfo, path: str | Path) -> None:
    """Raise ValueError, once for all cases, unless channels and normalisation of ``path`` are the model's."""
    if (Path(path) / "dataset.json").is_file():
        store = Store(path)
        modeldir.check_channels(info, store.channels, store.normalization)
    else:
        modeldir.check_channels(info, cohorts.CHANNELS)  # raw cases are normalised as the model expects


def begin(output: str | Path, record: Mapping[str, Any], jobs: Sequence[Job], keep: bool = True) -> None:
    """Write ``prediction.json`` into ``output``, unless what is there was made by other models or options.

    Args:
      record: JSON; its entries ``models`` and ``options`` must be those of the predictions that stay.
      keep: keep the label maps that are there; if not, those of ``jobs`` are removed.

    Raises:
      ValueError: see above; or there are label maps of unknown origin. Nothing is removed then.
    """
    output, record = Path(output), json.loads(json.dumps(record))  # tuples are lists once they are read back
    output.mkdir(parents=True, exist_ok=True)
    file, present = output / RECORD_FILE, sorted(output.glob("*.nii.gz"))
    if present and not file.is_file():
        raise ValueError(f"{present[0]} was not written by this program; choose another --output")
    replaced = [] if keep else [label_map_file(output, job.case_id) for job in jobs]
    if staying := sorted(set(present) - set(replaced)):
        before = store_files.read_json(file)
        if changed := [key for key in IDENTITY if before.get(key) != record[key]]:
            every = "or replace all label maps there with --noskip_existing and all their cases as --input"
            raise ValueError(f"{staying[0]} was predicted with other {' and '.join(changed)}; choose another --output, "
                             f"{every}")
    for label_map in replaced:
        label_map.unlink(missing_ok=True)
    atomic.write_json(file, record)


def predict_cases(
    jobs: Sequence[Job], predictor: Predictor, output: str | Path, options: Options, show: bool = True
) -> dict[str, str]:
    """Write ``<case_id>.nii.gz`` for every job that has none yet, or one of other scans; while one is computed, the
    next is read.

    A case that fails is reported on stderr in one line, and the others go on.

    Args:
      show: draw progress on stderr.

    Returns: {case id: reason} of the cases that failed.
    """
    output = Path(output)
    inputs = _known_inputs(output, jobs)
    todo = [job for job in jobs if not _is_done(job, output, inputs.get(job.case_id))]
    failed: dict[str, str] = {}
    work = _read_ahead(todo)
    for job, load in progress.track(work, total=len(todo), label="predict") if show else work:
        try:
            found, (image, record) = load()
            check_record(predictor.info, record)
            with _window_bar(job.case_id, show) as report:
                probabilities = predictor.predict(image, report)
            write_prediction(output, job.case_id, probabilities, record, predictor.info, options)
            inputs[job.case_id] = found
            atomic.write_json(output / INPUTS_FILE, inputs)
        except CASE_ERRORS as error:
            failed[job.case_id] = _reason(error).removeprefix(f"{job.case_id}: ")
            tqdm.write(f"failed: {job.case_id}: {failed[job.case_id]}", file=sys.stderr)
    return failed


def _known_inputs(output: Path, jobs: Sequence[Job]) -> dict[str, Any]:
    """What label maps were predicted from. Where that is not known, it is told, and costs no label map."""
    file = output / INPUTS_FILE
    try:
        known = store_files.read_json(file)
    except FileNotFoundError:
        known = {}
    except ValueError:
        print(f"warning: {file} is damaged; a new one is begun", file=sys.stderr)
        known = {}
    if count := sum(job.case_id not in known and label_map_file(output, job.case_id).exists() for job in jobs):
        print(f"warning: nothing tells which scans {count} label maps in {output} were predicted from, so that changed "
              "scans go unnoticed there; --noskip_existing predicts all cases again", file=sys.stderr)  # fmt: skip
    return known


def _is_done(job: Job, output: Path, known: Mapping[str, Any] | None) -> bool:
    """Whether there is a label map of these very scans; one of unknown scans counts as such, one of others goes."""
    label_map = label_map_file(output, job.case_id)
    if not label_map.exists():
        return False
    try:
        done = known is None or fingerprints.are_of(known, job.files)
    except (OSError, KeyError, TypeError, AttributeError):
        done = False
    if not done:
        print(f"{job.case_id}: its scans changed since; predicted again", file=sys.stderr)
        label_map.unlink()
    return done


def write_prediction(
    output: Path,
    case_id: str,
    probabilities: np.ndarray,
    record: Mapping[str, Any],
    info: modeldir.ModelInfo,
    options: Options,
) -> None:
    """Probabilities (D, H, W, K) of the cropped grid -> a label map in the case's own space, header and scheme."""
    label_map = options.rules(probabilities, info.output, info.regions, record["spacing_mm"])
    scheme = record["label_scheme"] if options.label_scheme == "input" else options.label_scheme
    if options.save_probabilities:
        file = output / PROBABILITIES_FOLDER / f"{case_id}.npz"
        file.parent.mkdir(exist_ok=True)
        names = list(info.regions) if info.output == "regions" else [str(i) for i in range(info.n_outputs)]
        whole = preprocess.restore(probabilities.astype(np.float16), record)
        with atomic.replacing(file) as temporary, open(temporary, "wb") as stream:
            np.savez_compressed(stream, probabilities=whole, names=names)
    # Last, since a case counts as done when its label map is there.
    restored = preprocess.restore(labels.from_canonical(label_map, scheme), record)
    nifti.write_like(label_map_file(output, case_id), restored, record)


def check_record(info: modeldir.ModelInfo, record: Mapping[str, Any]) -> None:
    """Raise ValueError unless the case's channels, by name and order, and its normalisation are the model's."""
    modeldir.check_channels(info, record["channels"], record["normalization"]["name"])


def _from_store(store: Store, case_id: str) -> Loaded:
    image, _, record = store.load(case_id)
    return np.asarray(image, np.float32), record


def label_map_file(output: Path, case_id: str) -> Path:
    return output / f"{case_id}.nii.gz"


def _read(job: Job) -> tuple[dict[str, fingerprints.Fingerprint | None], Loaded]:
    """What the job's files are, before they are read, and what it loads."""
    return {name: fingerprints.of(file) for name, file in job.files.items()}, job.load()


def _read_ahead(jobs: Sequence[Job]) -> Iterator[tuple[Job, Callable[[], tuple[dict, Loaded]]]]:
    """Each job with a function that gives what it reads or raises; the next job is read meanwhile, in a thread."""
    with ThreadPoolExecutor(1) as reader:
        upcoming = [reader.submit(_read, job) for job in jobs[:1]]
        for i, job in enumerate(jobs):
            upcoming += [reader.submit(_read, following) for following in jobs[i + 1 : i + 2]]
            yield job, upcoming.pop(0).result


@contextmanager
def _window_bar(case_id: str, show: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A second bar, on terminals, for the windows of the case at work."""
    if not (show and sys.stderr.isatty()):
        yield None
        return
    with tqdm(desc=case_id, unit="window", leave=False, dynamic_ncols=True) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


def _reason(error: Exception) -> str:
    if "RESOURCE_EXHAUSTED" in str(error):
        return "out of device memory; lower --windows_per_batch or --patch_voxels, or give --accumulate=host"
    return command.one_line(error)
