"""Several watchers of one training."""

from __future__ import annotations

from torch import Tensor

from classifier.engine import Observer, Position, Result, Trainer


class Observers:
    """Tells each of several observers, in their order."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def watch(self, trainer: Trainer, position: Position) -> None:
        """The training begins, or goes on, at ``position``."""
        for observer in self._observers:
            observer.watch(trainer, position)

    def mark(self, phase: str) -> None:
        """The named phase of the current step has just ended."""
        for observer in self._observers:
            observer.mark(phase)

    def mode(self, name: str) -> None:
        """``train`` or ``eval`` steps follow."""
        for observer in self._observers:
            observer.mode(name)

    def stepped(self, sums: Tensor) -> None:
        """A step has ended."""
        for observer in self._observers:
            observer.stepped(sums)

    def evaluated(self, train: Result, valid: Result) -> None:
        """An epoch has been trained and judged."""
        for observer in self._observers:
            observer.evaluated(train, valid)
