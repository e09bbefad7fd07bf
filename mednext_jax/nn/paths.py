"""One string path per parameter: ``enc_block_0/0/conv1/kernel``.

Rules, optimizer labels, checkpoints and the torch table all speak of flat dictionaries keyed by such a path;
only ``apply`` wants the nested form.
"""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Nested parameters as a flat dictionary ``{"stage/block/layer/leaf": array}``."""
    return traverse_util.flatten_dict(dict(params), sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`flatten`; ``model.apply({"params": unflatten(flat)}, x)``."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")
