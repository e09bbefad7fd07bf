"""What a rule trains, in numbers: the familiar line and a table per stage."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from mednext_jax.nn import paths
from mednext_jax.nn.mednext import count_parameters
from mednext_jax.peft import rules


def line(params: Mapping[str, Any], rule: rules.Rule) -> str:
    """``trainable params: 152,112 || all params: 5,703,188 || trainable%: 2.6671``, Hugging Face's line."""
    trainable, _ = rules.split(params, rule)
    some, every = count_parameters(trainable), count_parameters(params)
    return f"trainable params: {some:,d} || all params: {every:,d} || trainable%: {100 * some / every:.4f}"


def summary(params: Mapping[str, Any], rule: rules.Rule) -> str:
    """The line of :func:`line`, then one row per stage: all parameters, trained ones and their kinds.

    Raises:
      ValueError: a clause of the rule matches nothing.
    """
    trainable, _ = rules.split(params, rule)
    every = _per_stage(params)
    some = _per_stage(trainable)
    rows = [("stage", "parameters", "trained", "%", "kinds")]
    for stage in rules.stages(params):
        kinds = sorted({rules.kind_of(path) for path in trainable if rules.stage_of(path) == stage})
        rows.append(
            (
                stage,
                f"{every[stage]:,d}",
                f"{some[stage]:,d}",
                f"{100 * some[stage] / every[stage]:.2f}",
                " ".join(kinds) or "-",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    table = [
        f"{stage:<{widths[0]}}  {total:>{widths[1]}}  {part:>{widths[2]}}  {share:>{widths[3]}}  {kinds}"
        for stage, total, part, share, kinds in rows
    ]
    return "\n".join([line(params, rule), *table])


def _per_stage(params: Mapping[str, Any]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for path, leaf in paths.flatten(params).items():
        counts[rules.stage_of(path)] += leaf.size
    return counts
