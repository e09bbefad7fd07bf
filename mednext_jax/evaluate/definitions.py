"""What every metric means, in one sentence each, for reports."""

DEFINITIONS = {
    "dice": "2 TP / (2 TP + FP + FN) over voxels.",
    "iou": "TP / (TP + FP + FN) over voxels (Jaccard index).",
    "sensitivity": "TP / (TP + FN): share of the true region that was found. Low means under-segmentation.",
    "specificity": "TN / (TN + FP) over the whole grid; near 1 for any small region, so it says little.",
    "precision": "TP / (TP + FP): share of the predicted region that is true. Low means over-segmentation.",
    "volume_mm3": "Volume of the predicted region.",
    "reference_volume_mm3": "Volume of the true region.",
    "volume_difference_mm3": "Predicted - true volume; positive if too much was segmented.",
    "hd95_mm": "95th percentile of the distance between the surfaces, each surface element weighted by its "
    "area, the larger of both directions (DeepMind surface-distance; as in the official BraTS code).",
    "hd95_max_directed_mm": "The larger of the two directed 95th percentiles over border voxels (as in "
    "MONAI): a different number from the one above.",
    "hd95_pooled_mm": "95th percentile of the border-voxel distances of both directions together (as in "
    "medpy): a different number again, usually the smallest.",
    "nsd": "Normalised surface Dice: share of both surfaces' area within the tolerance of the other.",
    "assd_mm": "Average symmetric surface distance: mean of the two directed mean border-voxel distances.",
    "lesionwise_dice": "Official BraTS 2023 lesion-wise Dice: mean over true lesions (joined by dilation, "
    "above the volume limit) and false-positive components; the latter and missed lesions count 0.",
    "lesionwise_hd95_mm": "Official BraTS 2023 lesion-wise HD95: mean over the same, missed and invented "
    "ones at 374 mm.",
    "lesions_tp": "True lesions above the volume limit that a prediction touches (after dilation).",
    "lesions_fp": "Predicted components of any size that touch no true lesion.",
    "lesions_fn": "True lesions above the volume limit that no prediction touches.",
    "instance_pq": "Instance-wise panoptic quality, RQ x SQ: lesions matched one to one by Dice, undilated.",
    "instance_rq": "F1 of the matching: TP / (TP + (FP + FN) / 2).",
    "instance_sq": "Mean Dice of the matched lesions.",
    "instances_tp": "Matched lesions.",
    "instances_fp": "Predicted lesions without a match.",
    "instances_fn": "True lesions without a match.",
}


def of(metric: str) -> str:
    """Definition of a metric; NSD at any tolerance has one."""
    return DEFINITIONS["nsd" if metric.startswith("nsd_") else metric]
