"""The training data that a config names: raw folders become stores on first use, stores become a stream."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data_pipeline import preprocess
from data_pipeline.labels import REGIONS
from data_pipeline.store import Store
from data_pipeline.stream import make_stream
from mednext_jax.train import experiment
from mednext_jax.train.experiment import Data
from mednext_jax.train.network import DataContract

NO_DATA = (
    "no data: give --config.data.root=FOLDER of BraTS cases or --config.data.store=STORE; "
    "to try without data: python launch/simulate.py --output=data/simulated, "
    "then --config.data.root=data/simulated/target"
)


def open_stores(config: Mapping[str, Any], workdir: str | Path) -> list[Store]:
    """The stores of ``config["data"]``; comma-separated ``root`` and ``store`` name several cohorts.

    A root is preprocessed on first use: into the store of the same place in ``store`` if there is one, else
    into ``<workdir>/../store-<hash of the root's path>``, which other runs beside this one find again.
    """
    roots, stores = (_listed(config["data"][name]) for name in ("root", "store"))
    if not roots and not stores:
        raise ValueError(NO_DATA)
    if roots and stores and len(roots) != len(stores):
        raise ValueError(
            f"config.data.root names {len(roots)} folders, config.data.store {len(stores)}: give as many"
        )
    if not stores:
        stores = [_place_for(root, Path(workdir)) for root in roots]
    for root, store in zip(roots, stores, strict=False):
        if not (Path(store) / "dataset.json").is_file():
            if not Path(root).is_dir():
                raise FileNotFoundError(f"config.data.root={root} does not exist; {NO_DATA}")
            if jax.process_count() > 1:
                raise FileNotFoundError(
                    f"{root} is not preprocessed, and several processes must not do it at once: run python "
                    f"launch/preprocess.py --input={root} --output={store}, then the same command again"
                )
            print(f"preprocessing {root} into {store} (once)", flush=True)
            preprocess.preprocess(root, store)
    return [Store(store) for store in stores]


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _place_for(root: str, workdir: Path) -> str:
    digest = hashlib.sha256(str(Path(root).resolve()).encode()).hexdigest()[:12]
    return str(workdir.absolute().parent / f"store-{digest}")


def case_lists(config: Mapping[str, Any], store: Store) -> tuple[list[str], list[str]]:
    """Training and validation cases of one store; only cases with a segmentation."""
    section = config["data"]
    fold = section["fold"]
    if fold < 0:
        names = {"train_split": section["train_split"], "val_split": section["val_split"]}
        parts = [_split(store, field, name) for field, name in names.items()]
    else:
        parts = [_split(store, "fold", f"fold{fold}/{part}") for part in ("train", "val")]
    train, val = ([case for case in part if store.cases[case]["labelled"]] for part in parts)
    if not any(case["labelled"] for case in store.cases.values()):
        raise ValueError(f"{store.path}: no case has a segmentation; to train, put them beside the scans")
    most = section["max_train_cases"]
    if most:
        if most > len(train):
            raise ValueError(
                f"config.data.max_train_cases is {most}, but {store.path} has {len(train)} training cases"
            )
        order = np.random.default_rng(section["subset_seed"]).permutation(len(train))
        train = sorted(sorted(train)[i] for i in order[:most])
    return train, val


def _split(store: Store, field: str, name: str) -> list[str]:
    try:
        return store.split(name)
    except ValueError as error:
        raise ValueError(f"config.data.{field}: {error}") from error


def open_data(config: Mapping[str, Any], workdir: str | Path) -> Data:
    """Opens everything ``train.loop.fit`` needs; close ``.stream`` in the end.

    Raises: ValueError or FileNotFoundError, one line with the remedy.
    """
    section = config["data"]
    stores = open_stores(config, workdir)
    lists = [case_lists(config, store) for store in stores]
    owners: dict[str, Store] = {}
    for store, (_, val) in zip(stores, lists, strict=True):
        for case in val:
            if case in owners:
                raise ValueError(
                    f"validation case {case} is in {owners[case].path} and in {store.path}: leave one out"
                )
            owners[case] = store
    stream = make_stream(
        stores,
        [train for train, _ in lists],
        tuple(section["patch_voxels"]),
        section["batch_size"],
        section["foreground_fraction"],
        experiment.order_seed(config),
        weights=tuple(section["weights"]) or None,
        shard_index=jax.process_index(),
        shard_count=jax.process_count(),
        workers=section["workers"],
        threads=section["threads"],
        buffer=section["buffer"],
    )

    def load(case: str) -> tuple[np.ndarray, np.ndarray]:
        image, label, _ = owners[case].load(case)
        return image, label

    first = stores[0]
    contract = DataContract(
        tuple(first.channels),
        first.normalization,
        first.label_scheme,
        {name: list(values) for name, values in REGIONS.items()},
    )
    validation = _limited(sorted(owners), config["eval"]["max_cases"])
    named = _listed(section["root"]) or [store.path for store in stores]
    return Data(stream, contract, validation, load, name=",".join(Path(path).name for path in named))


def _limited(cases: Sequence[str], most: int) -> list[str]:
    """At most ``most`` cases, spread over the list; 0 means all."""
    if not most or most >= len(cases):
        return list(cases)
    return [cases[i * len(cases) // most] for i in range(most)]
