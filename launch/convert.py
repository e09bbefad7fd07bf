r"""Bring weights from PyTorch into a model directory, or take a model back to PyTorch.

    python launch/convert.py --input=best.ckpt --output=models/mednext_s
    python launch/convert.py --input=model_final_checkpoint.model --output=models/b --label_scheme=nnunet
    python launch/convert.py --input=best.ckpt --output=models/k5 --kernel_size=5      grow the kernels (UpKern)
    python launch/convert.py --input=models/mednext_s --output=mednext_s.safetensors   back, upstream's names

Reads .ckpt (Lightning), .model (nnU-Net v1), .pth (nnU-Net v2), .pt, .bin and .safetensors, of the official
MedNeXt, the adapter networks of arXiv 2412.14100 and MONAI's MedNeXt. torch is not needed, and no code inside a
checkpoint is ever executed. The model directory is what predict, evaluate and train (`init_from`) take.

A checkpoint does not say what its channels and classes are. What is not given here is assumed, and said.
"""

from pathlib import Path

import command
from absl import flags

from data_pipeline.cohorts import CHANNELS
from data_pipeline.labels import CANONICAL_SCHEME, NAMES, REGIONS
from mednext_jax import loading, modeldir
from mednext_jax.convert import convert, files, meaning, to_torch
from mednext_jax.nn import mednext, paths

# What the classes 0, 1, 2, 3 of a softmax head are.
CLASSES = {
    "brats2023": ("background", "NCR", "ED", "ET"),
    "brats2021": ("background", "NCR", "ED", "ET"),
    "nnunet": ("background", "ED", "NCR", "ET"),
}

INPUT = flags.DEFINE_string("input", None, "Checkpoint file, or the model directory to export.")
OUTPUT = flags.DEFINE_string("output", None, "Model directory to write, or FILE.safetensors to export to.")
CHANNELS_FLAG = flags.DEFINE_list(
    "channels", None, f"Scans in the order that the file's weights expect; {','.join(CHANNELS)} if not given."
)
NORMALIZATION = flags.DEFINE_string("normalization", "zscore_brain", "How training intensities were normalised.")
OUTPUT_KIND = flags.DEFINE_enum(
    "output_kind", None, modeldir.OUTPUTS, "Sigmoid regions (assumed of 3 outputs) or softmax labels (of 4)."
)
LABEL_SCHEME = flags.DEFINE_enum(
    "label_scheme", CANONICAL_SCHEME, sorted(CLASSES), "Order of softmax labels; nnunet: 1 is ED, 2 is NCR."
)
REGIONS_FLAG = flags.DEFINE_list("regions", list(REGIONS), "Order of sigmoid regions in the file.")
PATCH_VOXELS = flags.DEFINE_list("patch_voxels", ["128"] * 3, "Patch the network was trained on.")
DO_RES = flags.DEFINE_bool("do_res", None, "Residual in every block; leaves no trace in a file.")
NORM_TYPE = flags.DEFINE_enum("norm_type", None, ["group", "layer"], "Norm; leaves no trace in a file.")
KERNEL_SIZE = flags.DEFINE_integer("kernel_size", 0, "Grow the kernels to this odd size by UpKern; 0 keeps them.")
DROP_HEADS = flags.DEFINE_bool("drop_deep_supervision", False, "Leave out the deep-supervision heads.")


def said(name: str, value: object) -> object:
    """``value``, with a line on the terminal when its flag was not given."""
    if not flags.FLAGS[name].present:
        shown = ",".join(value) if isinstance(value, list | tuple) else value
        print(f"assumed: --{name}={shown} (a checkpoint does not tell)")
    return value


def read_checkpoint() -> tuple[dict, dict, dict]:
    """Arguments, flat parameters and provenance of the checkpoint, grown and pruned as the flags say."""
    known = {flag.name: flag.value for flag in (DO_RES, NORM_TYPE) if flag.value is not None}
    state_dict, notes = files.read(INPUT.value)
    try:
        done = convert(state_dict, **known)
    except ValueError as error:
        raise ValueError(f"{INPUT.value}: {error}") from error
    kwargs, flat, notes = dict(done.kwargs), paths.flatten(done.params), [*notes, *done.notes]
    for note in notes:
        print(f"note: {note}")
    if KERNEL_SIZE.value:
        kwargs |= {"kernel_size": KERNEL_SIZE.value, "enc_kernel_size": None, "dec_kernel_size": None}
    if DROP_HEADS.value:
        kwargs["deep_supervision"] = False
    if kwargs != done.kwargs:
        wanted = mednext.parameter_shapes(mednext.MedNeXt(**kwargs))
        flat, report = loading.merge(wanted, flat, allow_dropped=[r"out_[1-4]/.*"], grow_kernels=True)
        print(report)
    return kwargs, flat, {"file": Path(INPUT.value).name, "notes": notes, "dummy_tensor": done.dummy_tensor}


def input_names(n: int) -> tuple[list[str], list[str]]:
    """Names of the ``n`` input channels in the file's order, and in the model's: the canonical one if they can be."""
    if CHANNELS_FLAG.value is None and n != len(CHANNELS):
        raise ValueError(f"{INPUT.value} takes {n} channels; name them in order, --channels=A,B,...")
    names = list(said("channels", CHANNELS_FLAG.value or CHANNELS))
    return names, list(CHANNELS) if sorted(names) == sorted(CHANNELS) else names


def output_names(n: int) -> tuple[str, list[str], list[str], dict[str, list[int]]]:
    """Kind of the head's ``n`` outputs, their names in the file's order and in the model's, and the regions."""
    regions = {name: list(values) for name, values in REGIONS.items()}
    kind = OUTPUT_KIND.value or {len(REGIONS): "regions", len(NAMES): "labels"}.get(n)
    if kind is None:
        raise ValueError(f"{INPUT.value} has {n} outputs, neither {len(REGIONS)} regions nor {len(NAMES)} labels; "
                         f"keep them as the labels 0 to {n - 1} by --output_kind=labels")
    said("output_kind", kind)
    if kind == "regions":
        return kind, list(said("regions", REGIONS_FLAG.value)), list(regions), regions
    if n == len(NAMES):
        return kind, list(CLASSES[said("label_scheme", LABEL_SCHEME.value)]), list(NAMES.values()), regions
    labels = [f"label_{value}" for value in range(n)]
    return kind, labels, labels, {name: [value] for value, name in enumerate(labels) if value}


def import_checkpoint() -> None:
    """Checkpoint file to model directory."""
    kwargs, flat, provenance = read_checkpoint()
    theirs, channels = input_names(kwargs["in_channels"])
    flat = meaning.reorder_inputs(flat, theirs, channels)
    kind, outputs, order, regions = output_names(kwargs["n_classes"])
    flat = meaning.reorder_outputs(flat, outputs, order)
    provenance |= {"channels": [theirs, channels], "outputs": [outputs, order]}  # the file's order, the model's
    info = modeldir.ModelInfo(
        kwargs=kwargs, channels=tuple(channels), normalization=said("normalization", NORMALIZATION.value), output=kind,
        label_scheme=CANONICAL_SCHEME, regions=regions,
        patch_voxels=tuple(int(size) for size in said("patch_voxels", PATCH_VOXELS.value)[: int(kwargs["dim"][0])]),
        provenance={"converted": provenance},
    )  # fmt: skip
    modeldir.save_model(OUTPUT.value, info, flat)
    print(f"wrote {OUTPUT.value}: {mednext.count_parameters(flat):,} parameters")


def export_model() -> None:
    """Model directory to a safetensors file that upstream's class loads; channels and outputs in the file's order."""
    info, params = modeldir.load_model(INPUT.value)
    flat, origin = paths.flatten(params), info.provenance.get("converted", {})
    theirs, ours = origin.get("channels", [info.channels, info.channels])
    flat = meaning.reorder_inputs(flat, ours, CHANNELS_FLAG.value or theirs)
    if "outputs" in origin:
        theirs, ours = origin["outputs"]
        flat = meaning.reorder_outputs(flat, ours, theirs)
    files.write_safetensors(OUTPUT.value, to_torch(info.kwargs, flat, origin.get("dummy_tensor", 1.0)))
    print(f"wrote {OUTPUT.value} for the PyTorch class with the arguments {info.kwargs}")


def main(_) -> None:
    """Converts one file or model directory; ValueError or OSError, told in one line, where it cannot."""
    if not (INPUT.value and OUTPUT.value):
        raise ValueError("give --input=CHECKPOINT --output=DIRECTORY, or --input=MODEL --output=FILE.safetensors")
    command.refuse_existing(OUTPUT.value)
    if Path(INPUT.value).is_dir():
        if not OUTPUT.value.endswith(".safetensors"):
            raise ValueError(f"{INPUT.value} is a directory: a model is exported to a file, --output=FILE.safetensors")
        export_model()
    else:
        import_checkpoint()


if __name__ == "__main__":
    command.run(main)
