"""Several adapters on one base in memory, switched by name."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mednext_jax.nn import paths
from mednext_jax.peft import attach
from mednext_jax.peft.adapter_files import AdapterFile, load_adapter


class AdapterSet:
    """One base network and any number of adapters, of which one or none is in use.

    Only the adapters' own parameters are held beside the base's. Adapters of equal architecture (two sites,
    one method) share one compiled program, so switching between them costs nothing.

    Example::

        sites = AdapterSet(model, base_params)
        sites.add("lagos", "adapters/lagos")
        sites.add("kano", "adapters/kano")
        sites.set_active("kano")
        logits = sites.apply(image)
        with sites.disable_adapters():
            logits = sites.apply(image)  # the base's, the same bits as ``jax.jit(model.apply)`` gives
    """

    def __init__(self, model: Any, base_params: Mapping[str, Any]) -> None:
        self._base = paths.flatten(base_params)
        self._model = model
        self._adapters: dict[str, AdapterFile] = {}
        self._networks: dict[str, tuple[Any, dict[str, Any]]] = {}
        self._active: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters held, in the order in which they were added."""
        return tuple(self._adapters)

    @property
    def active(self) -> str | None:
        """Name of the adapter in use; None means the base alone."""
        return self._active

    @property
    def network(self) -> tuple[Any, dict[str, Any]]:
        """The model in use and its nested parameters, for ``model.apply({"params": params}, x)``."""
        if self._active is None:
            return self._model, paths.unflatten(self._base)
        return self._networks[self._active]

    def add(self, name: str, adapter: AdapterFile | str | os.PathLike, force: bool = False) -> None:
        """Take up an adapter, or the directory of one; it is not made active.

        Raises:
          ValueError: the name is taken, or the adapter belongs to another base or network (``force`` allows a
            base of other values).
          FileNotFoundError: no adapter in that directory.
        """
        if name in self._adapters:
            raise ValueError(f"an adapter called {name!r} is here already; remove it or choose another name")
        if not isinstance(adapter, AdapterFile):
            adapter = load_adapter(adapter, self._base, force)
        self._networks[name] = adapter.apply_to(self._model, self._base)
        self._adapters[name] = adapter

    def remove(self, name: str) -> None:
        """Forget an adapter; if it was active, the base is."""
        self._known(name)
        del self._adapters[name], self._networks[name]
        if self._active == name:
            self._active = None

    def set_active(self, name: str | None) -> None:
        """Use the adapter called ``name``, or the base alone (None)."""
        if name is not None:
            self._known(name)
        self._active = name

    @contextmanager
    def disable_adapters(self) -> Iterator["AdapterSet"]:
        """The base alone inside the block; the adapter that was active is so again after it."""
        before, self._active = self._active, None
        try:
            yield self
        finally:
            self._active = before if before in self._adapters else None

    def apply(self, x: Any) -> Any:
        """Logits of the network in use for x (B, D, H, W, C); compiled once per architecture and shape."""
        model, params = self.network
        return attach.compiled(model)({"params": params}, x)

    def _known(self, name: str) -> None:
        if name not in self._adapters:
            raise ValueError(
                f"no adapter is called {name!r}; there are {', '.join(self._adapters) or 'none'}"
            )
