"""Several watchers of one training."""

from __future__ import annotations

from torch import nn

from classifier.engine import Observer


class Observers:
    """Tells each of several observers, in their order."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def watch(self, network: nn.Module, loss_function: nn.Module) -> None:
        """The training of ``network`` begins."""
        for observer in self._observers:
            observer.watch(network, loss_function)

    def mark(self, phase: str) -> None:
        """The named phase of the current step has just ended."""
        for observer in self._observers:
            observer.mark(phase)

    def mode(self, name: str) -> None:
        """``train`` or ``eval`` steps follow."""
        for observer in self._observers:
            observer.mode(name)
