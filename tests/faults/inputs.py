"""All malformed inputs of the test-bench, in one list."""

from pathlib import Path

from tests.faults import malformed_images, malformed_tables, malformed_weights
from tests.faults.fuzz import Malformed


def everything(good: Path) -> list[Malformed]:
    """Every input; ``good`` is the folder of sound ones from which some are made."""
    return [
        *malformed_images.nifti(),
        *malformed_images.scanner(),
        *malformed_tables.splits(),
        *malformed_tables.stores(good),
        *malformed_tables.overrides(),
        *malformed_weights.directories(good),
        *malformed_weights.torch_files(good),
    ]
