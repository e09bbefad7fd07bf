"""The page that an adapter directory carries for people."""

from collections.abc import Mapping
from typing import Any


def card(config: Mapping[str, Any]) -> str:
    """The README.md of the adapter that ``adapter_config.json`` holding ``config`` describes."""
    options = "; ".join(
        f"{name}: " + (", ".join(f"{key}={value}" for key, value in opts.items()) or "no options")
        for name, opts in config["options"].items()
    )
    scores = "\n".join(f"| {name} | {value:.4g} |" for name, value in config["scores"].items())
    table = f"| score | value |\n|---|---|\n{scores}\n" if scores else "No scores were recorded.\n"
    return f"""# Adapter: {config["method"]}

A fine-tuning of a MedNeXt base: {config["parameters"]:,} trained parameters. It works on that base alone.

| | |
|---|---|
| method | {options} |
| base | `{config["base_hash"]}` |
| cohort | {config["cohort"] or "not named"} |
| channels, in order | {", ".join(config["channels"])} |
| normalisation | {config["normalization"]} |
| output | {config["output"]}: {", ".join(config["regions"])} |

{table}
Use: `python launch/predict.py --model=BASE --adapter=THIS_DIRECTORY --input=CASES --output=PREDICTIONS`.
For research only; not a medical device.
"""
