"""What an evaluation says in numbers: descriptions per arm, region and metric, and paired comparisons."""

from dataclasses import asdict, dataclass, replace
from itertools import combinations

from mednext_jax.evaluate import measure, policy, statistics
from mednext_jax.evaluate.cohort import Evaluation, Folder
from mednext_jax.evaluate.tables import MEAN_REGION, Table

COUNTS = ("lesions_tp", "lesions_fp", "lesions_fn", "instances_tp", "instances_fp", "instances_fn")
HOLM_FAMILY = "all regions and pairs of arms of one metric"


@dataclass(frozen=True)
class Summary:
    """Descriptions by (arm, region, metric) and comparisons by (first arm, second arm, region, metric).

    The region "mean" is a case's mean over the regions defined in it; volumes and counts have none.
    """

    descriptions: dict[tuple[str, str, str], statistics.Description]
    comparisons: dict[tuple[str, str, str, str], statistics.Comparison]


def summarise(table: Table, seed: int = 0, resamples: int = statistics.RESAMPLES) -> Summary:
    """Describes every arm and compares every pair of arms over the cases that both have."""
    descriptions, comparisons = {}, {}
    arms = list(table.arms)
    for metric in table.metrics:
        regions = regions_of(table, metric)
        for region in regions:
            for arm in arms:
                values = table.matrix(arm, region, metric)
                descriptions[arm, region, metric] = statistics.describe(values, seed, resamples)
        comparisons |= _compare(table, arms, regions, metric, seed, resamples)
    return Summary(descriptions, comparisons)


def regions_of(table: Table, metric: str) -> list[str]:
    """The table's regions, with "mean" behind them where averaging over regions makes sense."""
    averaged = metric not in (*COUNTS, *measure.VOLUME) and len(table.regions) > 1
    return [*table.regions, MEAN_REGION] if averaged else table.regions


def _compare(table: Table, arms, regions, metric: str, seed: int, resamples: int) -> dict:
    """All comparisons of one metric; together they are one Holm family."""
    found = {}
    for first, second in combinations(arms, 2):
        shared = sorted(set(table.cases(first)) & set(table.cases(second)))
        paired = table.seeds(first) == table.seeds(second)
        for region in regions:
            values = (table.matrix(arm, region, metric, shared) for arm in (first, second))
            better = measure.higher_is_better(metric)
            found[first, second, region, metric] = statistics.compare(*values, better, seed, resamples, paired)
    adjusted = statistics.holm([c.p for c in found.values()])
    return {key: replace(c, p_holm=p) for (key, c), p in zip(found.items(), adjusted, strict=True)}


def _where(folder: Folder) -> dict:
    """Where label maps lie and what their values mean."""
    relabel = None if folder.relabel is None else {str(v): label for v, label in folder.relabel.items()}
    return {"path": str(folder.path.resolve()), "label_scheme": folder.scheme, "relabel": relabel}


def as_json(evaluation: Evaluation, summary: Summary, made: dict) -> dict:
    """Content of ``summary.json``; `made` says how (command, versions)."""
    settings = evaluation.settings
    regions, metrics = evaluation.table.regions, evaluation.table.metrics
    return {
        "format": 1,
        "made": made,
        "settings": {
            "regions": {name: list(values) for name, values in settings.regions.items()},
            "challenge": settings.challenge,
            "tolerances_mm": list(settings.tolerances_mm),
            "absent_regions": {"policy": settings.empty, "meaning": policy.POLICIES[settings.empty]},
            "lesionwise": policy.LESIONWISE_NOTE,
            "interval": "95% percentile bootstrap of the mean over cases (and seeds)",
            "test": f"Wilcoxon signed-rank over cases, seeds averaged; Holm over {HOLM_FAMILY}",
        },
        "references": {
            **_where(evaluation.references),
            "cases": len(evaluation.references.files),
        },
        "runs": {
            arm.name: {
                **_where(arm),
                "cases": len(arm.files),
                "measured": len(arm.files) - len(evaluation.extra[arm.name]),
                "missing": list(evaluation.missing[arm.name]),
                "extra": list(evaluation.extra[arm.name]),
            }
            for arm in evaluation.arms
        },
        "arms": {
            arm: {
                region: {
                    m: asdict(summary.descriptions[arm, region, m])
                    for m in metrics
                    if (arm, region, m) in summary.descriptions
                }
                for region in (*regions, MEAN_REGION)
            }
            for arm in evaluation.table.arms
        },
        "comparisons": [
            {"first": first, "second": second, "region": region, "metric": metric, **asdict(comparison)}
            for (first, second, region, metric), comparison in summary.comparisons.items()
        ],
        "sha256": {
            folder.name: {case: i.sha256 for case, i in folder.inspections.items()}
            for folder in (evaluation.references, *evaluation.arms)
        },
    }
