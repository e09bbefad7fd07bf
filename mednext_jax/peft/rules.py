"""Which parameters a method trains, said over parameter paths such as ``dec_block_0/1/conv2/kernel``.

A :class:`Rule` is a union of :class:`Clause`; a clause is a regular expression on the path, a set of module
kinds, or both. Everything here works on flat dictionaries (nested ones are flattened), on arrays as on
shapes, so a rule can be tried on ``jax.eval_shape`` of a network that does not exist yet.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mednext_jax.nn import paths

DEEP_HEADS = r"out_[1-4]/.*"  # the heads of deep supervision
FROZEN = "frozen"
TRAINABLE = "trainable"

# Kind -> the paths it holds. The first kind that matches is the path's kind, so an adapter inside a norm's
# block is an adapter. Every kind is a part of the network that some method trains as a whole or an optimizer
# treats alike.
KINDS: dict[str, re.Pattern] = {
    kind: re.compile(pattern)
    for kind, pattern in {
        "adapter": r"(.*/)?(adapter(_\w+)?/.*|lora_[ab]|ssf_(scale|shift)|branch)",
        "head": r"out_\d+/.*",
        "norm": r"(.*/)?norm/\w+",
        "grn": r"(.*/)?grn_(gamma|beta)",
        "depthwise": r"(.*/)?conv1/\w+",
        "pointwise": r"(.*/)?conv[23]/\w+",
        "shortcut": r"(.*/)?res_conv/\w+",
        "stem": r"stem/\w+",
    }.items()
}
OTHER = "other"

# A path's top-level module, in the order in which the data passes; a head sits behind the stage that it
# reads.
_ORDER = (
    "stem",
    *(f"{m}_{i}" for i in range(4) for m in ("enc_block", "down")),
    "bottleneck",
    "out_4",
    *(f"{m}_{i}" for i in (3, 2, 1, 0) for m in ("up", "dec_block", "out")),
)


@dataclass(frozen=True)
class Clause:
    """Paths that ``pattern`` matches in full and whose kind is one of ``kinds`` (empty: any kind)."""

    pattern: str = ".*"
    kinds: Collection[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", (self.kinds,) if isinstance(self.kinds, str) else tuple(self.kinds))
        unknown = sorted(set(self.kinds) - {*KINDS, OTHER})
        if unknown:
            raise ValueError(
                f"unknown module kind {unknown[0]!r}; the kinds are {', '.join([*KINDS, OTHER])}"
            )
        compiled(self.pattern, "rule")

    def matches(self, path: str) -> bool:
        """Whether the clause trains ``path``."""
        return (not self.kinds or kind_of(path) in self.kinds) and re.fullmatch(
            self.pattern, path
        ) is not None

    def __str__(self) -> str:
        return f"{self.pattern!r}" + (f" of kind {'|'.join(self.kinds)}" if self.kinds else "")


@dataclass(frozen=True)
class Rule:
    """A path is trained if any clause matches it, frozen otherwise; ``a + b`` trains what either trains."""

    clauses: tuple[Clause, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "clauses", tuple(self.clauses))

    def matches(self, path: str) -> bool:
        """Whether the rule trains ``path``."""
        return any(clause.matches(path) for clause in self.clauses)

    def __add__(self, other: "Rule") -> "Rule":
        return Rule((*self.clauses, *(c for c in other.clauses if c not in self.clauses)))


def rule(pattern: str = ".*", kinds: Collection[str] = ()) -> Rule:
    """The rule of one clause; see :class:`Clause`."""
    return Rule((Clause(pattern, kinds),))


def compiled(pattern: str, what: str) -> re.Pattern:
    """``re.compile`` with an error of one line."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{what} {pattern!r} is not a regular expression: {error}") from None


def kind_of(path: str) -> str:
    """The kind of a parameter path: a key of ``KINDS``, or ``"other"``."""
    return next((kind for kind, pattern in KINDS.items() if pattern.fullmatch(path)), OTHER)


def depth_of(path: str) -> int:
    """Place of a path's module on the way from the stem (0) to the full-resolution head."""
    stage = stage_of(path)
    if stage not in _ORDER:
        raise ValueError(f"{path}: {stage!r} is not a module of MedNeXt")
    return _ORDER.index(stage)


def stage_of(path: str) -> str:
    """The top-level module of a path, such as ``enc_block_0``."""
    return path.split("/", 1)[0]


def stages(params: Mapping[str, Any]) -> list[str]:
    """The top-level modules of ``params`` in the order in which the data passes."""
    return sorted({stage_of(path) for path in paths.flatten(params)}, key=depth_of)


def split(params: Mapping[str, Any], rule: Rule) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide parameters into (trainable, frozen) flat dictionaries; every path falls on exactly one side.

    Take gradients with respect to the first alone, and give ``merge_trees`` of both to ``apply``.

    Raises:
      ValueError: a clause of the rule matches no path.
    """
    flat = paths.flatten(params)
    for clause in rule.clauses:
        if not any(clause.matches(path) for path in flat):
            raise ValueError(
                f"the rule {clause} matches none of the network's {len(flat)} parameters; "
                f"they read like {min(flat, default='nothing at all')}"
            )
    trainable = {path: leaf for path, leaf in flat.items() if rule.matches(path)}
    return trainable, {path: leaf for path, leaf in flat.items() if path not in trainable}


def merge_trees(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`split`: nested parameters, as ``apply`` wants them.

    Raises:
      ValueError: a path is on both sides.
    """
    both = trainable.keys() & frozen.keys()
    if both:
        raise ValueError(f"{min(both)} is among the trainable and among the frozen parameters")
    return paths.unflatten({**trainable, **frozen})


Groups = Collection[str] | Callable[[str], str] | None


def labels(params: Mapping[str, Any], rule: Rule, groups: Groups = None) -> dict[str, str]:
    """One label per path for ``optax.partition`` (or a learning rate per group).

    Args:
      params: nested or flat parameters, arrays or shapes.
      rule: paths outside it are labelled ``"frozen"``.
      groups: None labels the others ``"trainable"``; a collection of kinds (``("adapter", "head", "norm")``)
        gives a path of such a kind its kind and the others ``"trainable"``; a function of the path gives its
        own label, for example ``lambda path: f"depth_{depth_of(path)}"`` for layer-wise rates.

    Raises:
      ValueError: a clause of the rule matches nothing, or a group is no known kind.
    """
    trainable, _ = split(params, rule)
    label = groups if callable(groups) else _kind_label(groups or ())
    return {path: label(path) if path in trainable else FROZEN for path in paths.flatten(params)}


def _kind_label(groups: Collection[str]) -> Callable[[str], str]:
    clause = Clause(kinds=groups)  # checks the names

    def label(path: str) -> str:
        kind = kind_of(path)
        return kind if kind in clause.kinds else TRAINABLE

    return label
