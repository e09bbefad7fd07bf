"""What a run leaves behind for others: model directories, and the adapter alone where there is one."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from mednext_jax import modeldir, peft
from mednext_jax.nn import paths
from mednext_jax.train.experiment import Experiment

BEST, FINAL, ADAPTER = "best", "model", "adapter"


def save_best(
    workdir: Path, experiment: Experiment, trainable: Mapping[str, Any], provenance: Mapping[str, Any]
) -> None:
    """Writes ``best/``: the network with the best validation score so far, complete and ready to predict."""
    _save(workdir / BEST, experiment, experiment.parameters(trainable), provenance)


def save_final(
    workdir: Path,
    experiment: Experiment,
    trainable: Mapping[str, Any],
    provenance: Mapping[str, Any],
    use_best: bool,
    cohort: str,
) -> None:
    """Writes ``model/``, what predict loads, and ``adapter/`` if the method froze part of the base.

    Args:
      trainable: the last weights; they count if nothing was validated.
      provenance: of the last weights.
      use_best: take ``best/`` instead.
    """
    params = experiment.parameters(trainable)
    if use_best:
        if not (workdir / BEST).is_dir():
            raise FileNotFoundError(
                f"{workdir / BEST}, the best network of this run, is gone: put it back and run the same command again"
            )
        info, params = modeldir.load_model(workdir / BEST)
        provenance = info.provenance
    _save(workdir / FINAL, experiment, params, provenance)
    if experiment.frozen:
        flat = paths.flatten(params)
        peft.save_adapter(
            workdir / ADAPTER,
            experiment.method,
            {path: flat[path] for path in experiment.trainable},
            experiment.base.params,
            experiment.base.info,
            cohort=cohort,
            scores=provenance.get("scores"),
            provenance=provenance,
        )


def costs(
    experiment: Experiment, seconds_per_step: float | None, temporary_bytes: int | None
) -> dict[str, Any]:
    """What a run trains and what a step of it takes on this machine; None where that is not known.

    Args:
      seconds_per_step: mean over the last steps.
      temporary_bytes: of the compiled step, per device.
    """
    trainable, frozen = (sum(x.size for x in part.values()) for part in (experiment.trainable, experiment.frozen))
    return {
        "trainable": trainable,
        "parameters": trainable + frozen,
        "seconds_per_step": seconds_per_step,
        "temporary_bytes": temporary_bytes,
        "peak_device_bytes": (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "device": jax.devices()[0].device_kind,
    }


def _save(
    directory: Path, experiment: Experiment, params: Mapping[str, Any], provenance: Mapping[str, Any]
) -> None:
    info = dataclasses.replace(experiment.info, provenance=dict(provenance))
    modeldir.save_model(directory, info, params)
