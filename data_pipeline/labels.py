"""Label values of the BraTS releases, and the one canonical set that everything behind the scan uses.

Canonical labels are those of BraTS 2023 and later: 0 background, 1 necrotic core (NCR, NETC), 2 oedema (ED,
SNFH), 3 enhancing tumour (ET). BraTS 2021 and before wrote ET as 4 and never used 3. Post-treatment cases of
2024 use 4 for the resection cavity, so a 4 becomes ET only if the file is named as in 2021 or before.

Source: BraTS 2021 (arXiv:2107.02314) and BraTS 2023/2024 data descriptions.
"""

from collections.abc import Iterable, Mapping

import numpy as np

NAMES = {0: "background", 1: "NCR", 2: "ED", 3: "ET"}
# Regions are sets of canonical labels; the order WT, TC, ET is the order of channels, tables and plots.
REGIONS: dict[str, tuple[int, ...]] = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
CANONICAL_SCHEME = "brats2023"
# scheme -> {value in the file: canonical label}
SCHEMES: dict[str, dict[int, int]] = {
    "brats2021": {0: 0, 1: 1, 2: 2, 4: 3},
    "brats2023": {0: 0, 1: 1, 2: 2, 3: 3},
}
# What an unknown value most likely is: (scheme, value) -> (explanation, example of a map).
_LIKELY = {
    ("brats2023", 4): ("in post-treatment cases 4 is the resection cavity, not enhancing tumour", "4:0"),
    ("brats2021", 3): ("in files converted to the newer values 3 is enhancing tumour", "3:3"),
}


def distinct_values(array: np.ndarray) -> list[float]:
    """Distinct values of a label map of any shape, ascending; whole numbers come as int, NaN as nan."""
    array = np.asarray(array)
    with np.errstate(invalid="ignore", over="ignore"):
        small = array.astype(np.uint8)
        exact = bool((small == array).all())
    if exact:  # counting is ten times faster than sorting nine million voxels
        return [int(value) for value in np.flatnonzero(np.bincount(small.ravel(), minlength=1))]
    values = np.unique(array).tolist()
    return [int(value) if float(value).is_integer() else value for value in values]


def detect_scheme(
    naming: str,
    values: Iterable[float],
    source: str = "segmentation",
    label_map: Mapping[int, int] | None = None,
) -> str:
    """Label scheme of a file from its naming, confirmed by the values found in it.

    Args:
      naming: how the case is named, a key of ``SCHEMES`` (see ``cohorts.Case.naming``).
      values: distinct values found in the file.
      source: file name for the error.
      label_map: the user's own {value in the file: canonical label}; values in it are accepted.

    Raises:
      ValueError: a value that neither the scheme nor ``label_map`` knows.
    """
    if naming not in SCHEMES:
        raise ValueError(f"unknown naming {naming!r}: known are {', '.join(SCHEMES)}")
    table = _table(naming, label_map)
    unknown = [value for value in values if value not in table]
    if unknown:
        shown = ", ".join(f"{value:g}" for value in unknown[:8]) + (", ..." if len(unknown) > 8 else "")
        known = ", ".join(str(value) for value in sorted(table))
        why, example = next(
            (_LIKELY[naming, v] for v in unknown if (naming, v) in _LIKELY), ("", "VALUE:LABEL")
        )
        what = f"label value {shown} is unknown in {naming} naming (known: {known})"
        remedy = "correct the file"
        if all(float(value).is_integer() and 0 <= value <= 255 for value in unknown):  # others are no labels
            remedy += f" or map the value: launch/preprocess.py --label_map={example}"
        raise ValueError(f"{source}: {what}; {why + '; ' if why else ''}{remedy}")
    return naming


def to_canonical(
    array: np.ndarray,
    scheme: str,
    label_map: Mapping[int, int] | None = None,
    source: str = "segmentation",
) -> np.ndarray:
    """Turns a file's label values into canonical ones.

    Args:
      array: label map of any shape and numeric dtype.
      scheme: key of ``SCHEMES``.
      label_map: {value in the file: canonical label}, added to the scheme and winning over it.

    Returns:
      uint8 array of the same shape, values 0 to 3.

    Raises:
      ValueError: unknown scheme, or a value that neither scheme nor map knows.
    """
    array = np.asarray(array)
    detect_scheme(scheme, distinct_values(array), source, label_map)
    lookup = np.zeros(256, np.uint8)
    for value, label in _table(scheme, label_map).items():
        lookup[value] = label
    return lookup[array.astype(np.uint8)]


def from_canonical(array: np.ndarray, scheme: str) -> np.ndarray:
    """Turns canonical labels (0 to 3, any shape) into the values of ``scheme``, as uint8.

    Raises:
      ValueError: unknown scheme, or a value outside 0 to 3.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"unknown label scheme {scheme!r}: known are {', '.join(SCHEMES)}")
    array = np.asarray(array)
    wrong = [value for value in distinct_values(array) if value not in NAMES]
    if wrong:
        raise ValueError(f"canonical labels are 0 to 3, found {wrong[0]:g}")
    lookup = np.zeros(len(NAMES), np.uint8)
    for value, label in SCHEMES[scheme].items():
        lookup[label] = value
    return lookup[array.astype(np.uint8)]


def region_mask(labels: np.ndarray, region: str) -> np.ndarray:
    """Boolean mask of ``region`` (a key of ``REGIONS``) in a canonical label map of any shape."""
    return np.isin(labels, REGIONS[region])


def parse_label_map(text: str) -> dict[int, int]:
    """Reads ``"4:0,5:2"`` as {4: 0, 5: 2}: value in the file to canonical label. Empty text is an empty map.

    Raises:
      ValueError: text that is not such a list, a value outside 0 to 255, a label outside 0 to 3.
    """
    result: dict[int, int] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        value, colon, label = item.partition(":")
        if not (colon and value.strip().isdecimal() and label.strip().isdecimal()):
            raise ValueError(f"label map {text!r}: {item!r} is not VALUE:LABEL (example: 4:0,5:2)")
        if int(value) in result:
            raise ValueError(f"label map {text!r} names value {int(value)} twice")
        result[int(value)] = int(label)
    return check_label_map(result)


def check_label_map(label_map: Mapping[int, int] | None) -> dict[int, int]:
    """A checked copy of a user's label map; None is the empty map.

    Raises:
      ValueError: a value outside 0 to 255 or a label outside 0 to 3.
    """
    for value, label in (label_map or {}).items():
        if not 0 <= value <= 255 or label not in NAMES:
            rule = "the value in the file must be 0 to 255 and the canonical label 0 to 3"
            raise ValueError(f"label map {value}:{label}: {rule}")
    return dict(label_map or {})


def _table(scheme: str, label_map: Mapping[int, int] | None) -> dict[int, int]:
    return {**SCHEMES[scheme], **check_label_map(label_map)}
