r"""Makes a copy of a cohort with one fault of the released study in it, for ablations.

    python launch/fault.py --fault=permuted_channels --input=DATA/BraTS-Africa --output=faulty/permuted
    python launch/fault.py --fault=squeezed --voxels=64,64,64 --input=DATA/BraTS-Africa --output=faulty/squeezed

permuted_channels swaps T1ce and FLAIR (by links); squeezed resizes whole volumes without anti-aliasing.
"""

import command
from absl import flags

from data_pipeline import faults

FAULT = flags.DEFINE_enum("fault", None, faults.FAULTS, "Which fault.", required=True)
INPUT = flags.DEFINE_string("input", None, "Folder of BraTS cases.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Folder for the faulty cohort.", required=True)
VOXELS = flags.DEFINE_list("voxels", ["64", "64", "64"], "Size of squeezed volumes.")


def main(_) -> None:
    """Writes the faulty store; ValueError or OSError, told in one line, where it cannot."""
    if FAULT.value == "permuted_channels":
        faults.permute_channels(INPUT.value, OUTPUT.value)
    else:
        if not all(size.isdecimal() for size in VOXELS.value):
            raise ValueError(f"--voxels={','.join(VOXELS.value)}: give three sizes, like 64,64,64")
        faults.squeeze(INPUT.value, OUTPUT.value, [int(size) for size in VOXELS.value])
    print(OUTPUT.value)


if __name__ == "__main__":
    command.run(main)
