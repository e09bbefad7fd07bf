"""The endless stream of training batches: Grain over memory-mapped stores.

    stream = make_stream(Store("stores/africa"), "train", (128, 128, 128), batch_size=2,
                         foreground_fraction=0.33, seed=0)
    batch = next(stream)      # {"image": (B, D, H, W, 4) float32, "label": (B, D, H, W) int32, ...}
    state = stream.get_state()
    stream.close()

What batch ``k`` holds is a function of the arguments and ``k`` alone. Grain orders the cases (a new order
in every epoch, cohorts mixed by weight); a sample's own decisions come from a generator keyed by (seed,
global sample index). Only light plans are batched; each process then cuts its own contiguous rows of the
global batch straight into the batch array. So threads, worker processes and the number of training
processes change the speed and nothing else, and the state is one number.

Intensities and resampling are left to the device: one host core cuts crops several times faster than it
can augment them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from data_pipeline import reader
from data_pipeline.batches import Batch, CutBatch, Plan
from data_pipeline.cohorts import shown
from data_pipeline.store import Store

# Crop-only batches take milliseconds; a cold network drive may take seconds. Minutes mean a stuck reader.
TIMEOUT_SECONDS = 300.0


class Stream(Iterator[Batch]):
    """Iterator over one shard's batches. Use ``make_stream``; see there for what a batch holds.

    ``dataset[k]`` is batch ``k`` of this shard, made on the spot: to look at what a run saw at step ``k``.
    """

    def __init__(self, dataset, fingerprint: dict, workers: int, threads: int, buffer: int, timeout: float):
        self.dataset = dataset
        self.fingerprint = fingerprint
        self._workers, self._threads, self._buffer = workers, threads, buffer
        self._timeout = timeout
        self._next_index = 0
        self._reader: reader.Reader | None = None
        self._closed = False

    def __next__(self) -> Batch:
        """Returns the next batch.

        Raises:
          TimeoutError: no batch came within the time-out.
          ChildProcessError: a worker process died.
          ValueError: the stream is closed, or a case cannot be read (names it).
        """
        if self._closed:
            raise ValueError("the data stream is closed: make a new one")
        if self._reader is None:
            # Grain's own state depends on the number of workers; a slice that starts at the wanted batch
            # does not.
            rest = self.dataset[self._next_index :]
            self._reader = reader.Reader(rest, self._workers, self._threads, self._buffer)
        try:
            batch = self._reader.read(self._timeout)
        except BaseException:
            self._stop()
            raise
        self._next_index += 1
        return batch

    def get_state(self) -> dict:
        """Returns the position, in global batches, and what it is a position in; plain JSON."""
        return {"next_index": self._next_index, **self.fingerprint}

    def set_state(self, state: dict) -> None:
        """Continues from a state of ``get_state``, made with any number of threads, workers or processes.

        Raises:
          ValueError: the state belongs to another stream (names the field that differs).
        """
        for name, value in self.fingerprint.items():
            if state.get(name) != value:
                raise ValueError(
                    f"the saved data position is of another stream: {name} was {state.get(name)!r}, "
                    f"now {value!r}; restore the old "
                    f"{'splits' if name == 'cases' else 'setting'} or start a new workdir"
                )
        position = state.get("next_index")
        if not isinstance(position, int) or position < 0:
            raise ValueError(f"the saved data position has next_index {position!r}; a number >= 0 is needed")
        self._stop()
        self._next_index = position

    def _stop(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def close(self) -> None:
        """Ends threads and workers and frees their buffers. Safe to call twice."""
        self._stop()
        self._closed = True

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def make_stream(
    stores: Store | Sequence[Store],
    split: str | Sequence,
    patch_voxels: Sequence[int],
    batch_size: int,
    foreground_fraction: float,
    seed: int,
    weights: Sequence[float] | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
    workers: int = 0,
    threads: int = 2,
    buffer: int = 2,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Stream:
    """Opens the endless stream of training crops.

    Args:
      stores: one store, or one per cohort.
      split: name of the split, or the case ids themselves; with a sequence of stores, a name for all of
        them or a sequence with one name or list of ids per store.
      patch_voxels: (d, h, w); larger than a volume is padded with zeros (see ``patches``).
      batch_size: GLOBAL batch, divisible by ``shard_count``.
      foreground_fraction: share of crops centred on tumour, in [0, 1].
      seed: 0 to 2**32 - 1; decides everything.
      weights: relative frequency of each store; exact (Grain interleaves in a fixed rhythm). None or empty
        treats all cases alike, whichever store they come from.
      shard_index, shard_count: this process and the number of processes. Shard ``i`` holds rows
        ``i * B`` to ``(i + 1) * B - 1`` of every global batch, B = batch_size // shard_count.
      workers: worker processes; 0 reads in threads of this process, which is faster on a few cores (a
        crop of 128^3 x 4 is 34 MB to send between processes).
      threads: reading threads when ``workers`` is 0; 0 reads when asked.
      buffer: batches read ahead. Memory: about (buffer + 2) batches of this shard.
      timeout_seconds: longest wait for one batch.

    Returns:
      Iterator of {"image": (B, D, H, W, C) float32, "label": (B, D, H, W) int32, "case_id": (B,) str,
      "index": (B,) int64 global sample index, "batch_case_id": (batch_size,) str, of all shards}.

    Raises:
      ValueError: names the argument or the store, and the remedy.
    """
    if isinstance(stores, Store):
        stores, split = (stores,), (split,)
    stores = tuple(stores)
    splits = (split,) * len(stores) if isinstance(split, str) else tuple(split)
    weights = tuple(weights) if weights else None
    patch_voxels = tuple(int(size) for size in patch_voxels)
    _check_arguments(stores, splits, patch_voxels, batch_size, foreground_fraction, seed, weights)
    _check_shard(batch_size, shard_index, shard_count)
    cohorts = [_training_cases(store, part) for store, part in zip(stores, splits, strict=True)]
    rows = batch_size // shard_count
    mine = slice(shard_index * rows, (shard_index + 1) * rows)
    dataset = (
        _ordered_plans(cohorts, weights, seed)
        .batch(batch_size, drop_remainder=True, batch_fn=list)
        .map(CutBatch(stores, patch_voxels, float(foreground_fraction), seed, mine))
    )
    fingerprint = {
        "seed": int(seed),
        "batch_size": int(batch_size),
        "patch_voxels": list(patch_voxels),
        "foreground_fraction": float(foreground_fraction),
        "weights": list(map(float, weights or ())),
        "stores": [store.data_hash for store in stores],
        "cases": hashlib.sha256(json.dumps(cohorts).encode()).hexdigest(),
    }
    return Stream(dataset, fingerprint, workers, threads, buffer, timeout_seconds)


def _training_cases(store: Store, part: str | Sequence[str]) -> list[str]:
    """Case ids of one split, by name or as given; all of them labelled."""
    case_ids = store.split(part) if isinstance(part, str) else list(part)
    name = shown(store.path)
    if not case_ids:
        raise ValueError(f"{name}: split {part!r} holds no cases; choose another split")
    for case_id in case_ids:
        if case_id not in store.cases:
            raise ValueError(f"{name}: no case {case_id!r} in this store; see its dataset.json")
        if not store.cases[case_id]["labelled"]:
            raise ValueError(f"{name}: case {case_id} has no segmentation to train on; leave it out")
    return case_ids


def _ordered_plans(cohorts: Sequence[Sequence[str]], weights, seed: int) -> grain.MapDataset:
    """The endless sequence of plans: a new order of the cases in every epoch, cohorts mixed by weight."""
    members = [[(cohort, case_id) for case_id in case_ids] for cohort, case_ids in enumerate(cohorts)]
    if weights is None:
        members = [sum(members, [])]
    # Grain adds the epoch to its shuffle seed: plain seeds 0 and 1 would share all orders but one.
    seeds = np.random.SeedSequence(seed).generate_state(len(members))
    orders = [
        grain.MapDataset.source(member).shuffle(seed=int(own)).repeat()  # repeat first: a mix ends with
        for member, own in zip(members, seeds, strict=True)  # its shortest member
    ]
    mixed = orders[0] if weights is None else grain.MapDataset.mix(orders, weights)
    return mixed.map_with_index(lambda index, member: Plan(index, *member))


def _check_arguments(stores, splits, patch_voxels, batch_size, foreground_fraction, seed, weights) -> None:
    if not stores:
        raise ValueError("no store to read from: give at least one")
    if len(splits) != len(stores):
        raise ValueError(f"{len(splits)} splits for {len(stores)} stores: give one name, or one per store")
    if len(patch_voxels) != 3 or min(patch_voxels) < 1:
        raise ValueError(f"patch_voxels is {patch_voxels}: three positive sizes are needed")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: at least 1 is needed")
    if not 0 <= foreground_fraction <= 1:
        raise ValueError(f"foreground_fraction is {foreground_fraction}: a number from 0 to 1 is needed")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}: a number from 0 to 2**32 - 1 is needed")
    if weights is not None and len(weights) != len(stores):
        raise ValueError(f"{len(weights)} weights for {len(stores)} stores: give one per store")
    if weights is not None and not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"weights are {weights}: give positive numbers, and leave a store out instead of 0")
    _check_alike(stores)


def _check_alike(stores: Sequence[Store]) -> None:
    first = stores[0]
    for store in stores[1:]:
        for name in ("channels", "normalization"):
            one, other = getattr(first, name), getattr(store, name)
            if one != other:
                where = f"{shown(first.path)} and {shown(store.path)}"
                raise ValueError(f"{where} differ in {name} ({one!r}, {other!r}): preprocess both alike")


def _check_shard(batch_size: int, shard_index: int, shard_count: int) -> None:
    if not 0 <= shard_index < shard_count:
        raise ValueError(f"shard_index is {shard_index}: 0 to {shard_count - 1} is needed")
    if batch_size % shard_count:
        raise ValueError(f"batch_size {batch_size} is no multiple of the {shard_count} processes")
