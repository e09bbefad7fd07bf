"""From a method's name and options to a :class:`Method` that can be applied to a network."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mednext_jax.nn.adapters import Adapter
from mednext_jax.nn.mednext import parameter_shapes
from mednext_jax.peft import attach
from mednext_jax.peft import targets as where
from mednext_jax.peft.methods import METHODS, Parts
from mednext_jax.peft.rules import Rule, rule

# Adapters that add leaves to the layer they adapt; the others are submodules called by their name.
_ADDED = {
    "lora": rule(r".*/lora_[ab]"),
    "ssf": rule(r".*/ssf_(scale|shift)"),
    "depthwise": rule(r".*/branch"),
}


@dataclass(frozen=True)
class Method:
    """What a method adds to the network, and the rule over parameter paths that says what it trains.

    Attributes:
      name: as given to :func:`create`, such as ``"lora+norm"``.
      options: every option with the value in use; of a composition, per part.
      adapters: what is added to the network, plain data for ``MedNeXt(adapters=...)``.
      base_rule: the base's own parameters that are trained; ``rule`` adds those of the adapters.
      fresh: the base's parameters drawn anew by :meth:`apply_to`, or None.
      identity: whether the adapted network starts as the base's function: what is added is zero, and what multiplies
        is one. Compiled logits are then the base's bit for bit, but for what XLA rounds elsewhere in the larger
        program: the last bits, with ``ssf`` after the down blocks and with a ``depthwise_adapter`` larger than the
        kernel beside it (docs/peft.md has all that was seen).
    """

    name: str
    options: Mapping[str, Mapping[str, Any]] = field(hash=False)
    adapters: tuple[Adapter, ...] = ()
    base_rule: Rule = Rule(())
    fresh: Rule | None = None
    identity: bool = True

    @property
    def rule(self) -> Rule:
        """All trained paths."""
        return sum(
            (
                _ADDED[spec.kind] if spec.kind in _ADDED else rule(rf".*/{spec.name}/.*")
                for spec in self.adapters
            ),
            start=self.base_rule,
        )

    def apply_to(self, model: Any, base_params: Mapping[str, Any], key: Any) -> tuple[Any, dict[str, Any]]:
        """The network with the method's additions, and its parameters: the base's and the new ones.

        Args:
          model: a ``MedNeXt`` without adapters.
          base_params: its parameters, nested or flat.
          key: JAX key from which the new parameters are drawn.

        Returns: (model, nested parameters). Where ``identity`` holds, logits equal the base's as it says.

        Raises:
          ValueError: the parameters are not the model's, or the method does not fit the network.
        """
        self.shapes_on(model)
        try:
            return attach.attach(model, base_params, self.adapters, self.rule, self.fresh, key)
        except ValueError as error:
            raise ValueError(f"method {self.name!r}: {error}") from None

    def shapes_on(self, model: Any) -> dict[str, Any]:
        """The shapes of all parameters of ``model`` with the method's additions, flat; nothing is computed.

        Raises:
          ValueError: the method does not fit the network.
        """
        sites, own = model.sites(), parameter_shapes(model)
        known = {*sum(sites.values(), ()), *own}
        try:
            for name, options in self.options.items():
                if options.get("targets"):
                    where.check(options["targets"], known)
                _check_part(name, options, sites, own)
            return attach.fit(model, self.adapters, self.rule)[1]
        except ValueError as error:
            raise ValueError(f"method {self.name!r}: {error}") from None


def create(method: str, **options: Any) -> Method:
    """The method called ``method``; ``"a+b"`` trains what either trains and adds what both add.

    An option that is None keeps the method's default. In a composition an option goes to every part that has
    it; use :func:`compose` to give the parts different values.

    Raises:
      ValueError: no such method or option, or a value out of its range.
    """
    names = [name.strip() for name in method.split("+")]
    given = {name: value for name, value in options.items() if value is not None}
    for name in names:
        if name not in METHODS:
            raise ValueError(f"unknown method {name!r}; the methods are {', '.join(METHODS)}")
    known = [_defaults(name) for name in names]
    for option in given:
        if not any(option in defaults for defaults in known):
            takes = ", ".join(dict.fromkeys(key for defaults in known for key in defaults)) or "no options"
            raise ValueError(f"method {method!r} has no option {option!r}; it takes {takes}")
    for option, value in given.items():
        if any(isinstance(defaults.get(option), bool) for defaults in known) and not isinstance(value, bool):
            raise ValueError(f"method {method!r}: {option} is {value!r}; it must be true or false")
    parts = [
        _create_one(name, {key: given.get(key, value) for key, value in defaults.items()})
        for name, defaults in zip(names, known, strict=True)
    ]
    return parts[0] if len(parts) == 1 else compose(*parts)


def compose(*methods: Method) -> Method:
    """One method that trains what any of ``methods`` trains and adds what all of them add.

    Raises:
      ValueError: a method appears twice.
    """
    names = [name for method in methods for name in method.options]
    if len(set(names)) < len(names):
        raise ValueError(f"{'+'.join(names)}: a method can appear once in a composition")
    specs = [spec for method in methods for spec in method.adapters]
    fresh = [method.fresh for method in methods if method.fresh is not None]
    return Method(
        "+".join(names),
        {name: opts for m in methods for name, opts in m.options.items()},
        _distinct(specs),
        sum((m.base_rule for m in methods), start=Rule(())),
        sum(fresh[1:], start=fresh[0]) if fresh else None,
        all(m.identity for m in methods),
    )


def from_config(config: Mapping[str, Any]) -> Method:
    """The method of a config section ``{"method": name, option: value or None, ...}``."""
    options = dict(config)
    return create(options.pop("method"), **options)


def options_of(method: str) -> dict[str, Any]:
    """The options of one method with their defaults."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; the methods are {', '.join(METHODS)}")
    return _defaults(method)


def _check_part(
    name: str, options: Mapping[str, Any], sites: Mapping[str, Sequence[str]], own: Mapping[str, Any]
) -> None:
    """Raise ValueError, in the words of the options, unless a method finds what it wants in a network.

    Network and rule would refuse it too, but they know the regular expressions alone.
    """
    parts = METHODS[name](**options)
    given = [f"{key}={value!r}" for key, value in options.items() if value != _defaults(name)[key]]
    said = f"{name} with {', '.join(given)}" if given else name
    for clause in parts.rule.clauses:
        if not any(clause.matches(path) for path in own):
            raise ValueError(f"{said} matches none of the network's {len(own)} parameters")
    for spec in parts.adapters:
        kinds = ("module", "layer") if spec.kind == "ssf" else (spec.site_kind,)
        if not any(spec.matches(site) for kind in kinds for site in sites[kind]):
            raise ValueError(f"{said} matches no {' or '.join(kinds)} of the network")


def _distinct(specs: Sequence[Adapter]) -> tuple[Adapter, ...]:
    """``specs`` with a name of its own for each that lives in a submodule, so that two may share a block."""
    taken: set[str] = set()
    renamed = []
    for spec in specs:
        while spec.kind not in _ADDED and spec.name in taken:
            spec = replace(spec, name=f"{spec.name}_{spec.kind}")
        taken.add(spec.name)
        renamed.append(spec)
    return tuple(renamed)


def _defaults(name: str) -> dict[str, Any]:
    return {key: parameter.default for key, parameter in inspect.signature(METHODS[name]).parameters.items()}


def _create_one(name: str, options: Mapping[str, Any]) -> Method:
    try:
        parts: Parts = METHODS[name](**options)
    except ValueError as error:
        raise ValueError(f"method {name!r}: {error}") from None
    return Method(name, {name: dict(options)}, parts.adapters, parts.rule, parts.fresh, parts.identity)
