"""The ranges of a tuning job: what SageMaker accepts, their scales, and how Optuna names them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from local_cloud.sagemaker.common import Record, invalid

KINDS = ("Continuous", "Integer", "Categorical")
_MAX_HYPERPARAMETERS = 30


@dataclass(frozen=True)
class Dimension:
    """One searched hyperparameter. The *outer* value is SageMaker's string, the *inner* one Optuna's.

    They differ for ``ReverseLogarithmic``, which is dense near 1: logarithmic in 1 - x.
    """

    kind: str
    item: Record

    @property
    def name(self) -> str:
        """The hyperparameter's name."""
        return str(self.item["Name"])

    @property
    def _reverse(self) -> bool:
        return self.item.get("ScalingType") == "ReverseLogarithmic"

    @property
    def _bounds(self) -> tuple[float, float]:
        low, high = float(self.item["MinValue"]), float(self.item["MaxValue"])
        return (1.0 - high, 1.0 - low) if self._reverse else (low, high)

    @property
    def _logarithmic(self) -> bool:
        """``Auto`` chooses logarithmic where a positive range spans a factor of ten or more."""
        low, high = self._bounds
        scaling = self.item.get("ScalingType", "Auto")
        return self._reverse or scaling == "Logarithmic" or (scaling == "Auto" and low > 0 and high / low >= 10)

    @property
    def distribution(self) -> Any:
        """Optuna's distribution of the inner value."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.kind == "Categorical":
            return CategoricalDistribution(self.item["Values"])
        low, high = self._bounds
        if self.kind == "Integer":
            return IntDistribution(int(low), int(high), log=self._logarithmic)
        return FloatDistribution(low, high, log=self._logarithmic)

    def at(self, share: float) -> Any:
        """The inner value at ``share`` (0 to 1) of the range, on the scale that the range names."""
        if self.kind == "Categorical":
            return self.item["Values"][int(share * len(self.item["Values"]))]
        low, high = self._bounds
        value = low * (high / low) ** share if self._logarithmic else low + share * (high - low)
        value = min(max(value, low), high)  # rounding must not leave the range
        return round(value) if self.kind == "Integer" else value

    def outer(self, value: Any) -> str:
        """SageMaker's string for an inner value."""
        if self.kind == "Continuous":
            return repr(1.0 - value if self._reverse else value)
        return str(value)

    def inner(self, text: str) -> Any:
        """The inner value for SageMaker's string, or None when it lies outside the range."""
        if self.kind == "Categorical":
            return text if text in self.item["Values"] else None
        try:
            number = float(text)
        except ValueError:
            return None
        if self.kind == "Integer" and not number.is_integer():
            return None
        number = 1.0 - number if self._reverse else number
        low, high = self._bounds
        if not low <= number <= high:
            return None
        return int(number) if self.kind == "Integer" else number


def dimensions(ranges: Mapping[str, Any]) -> list[Dimension]:
    """Every searched hyperparameter of ParameterRanges."""
    return [Dimension(kind, item) for kind in KINDS for item in ranges.get(f"{kind}ParameterRanges", [])]


def grid(ranges: Mapping[str, Any]) -> list[dict[str, str]]:
    """Every combination of the categorical ranges, in order."""
    items = ranges.get("CategoricalParameterRanges", [])
    names = [item["Name"] for item in items]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(item["Values"] for item in items))]


def check(config: Record, static: Mapping[str, str]) -> None:
    """Refuse ranges that SageMaker refuses: none, empty or reversed ones, a name twice, scales that do not fit."""
    found = dimensions(config["ParameterRanges"])
    if not found:
        raise invalid("ParameterRanges must name at least one hyperparameter to tune.")
    if len(found) > _MAX_HYPERPARAMETERS:
        raise invalid(f"ParameterRanges name {len(found)} hyperparameters; expected at most {_MAX_HYPERPARAMETERS}.")
    names = [space.name for space in found]
    for name in names:
        if names.count(name) > 1:
            raise invalid(f"The hyperparameter {name!r} has two ranges: keep one.")
        if name in static:
            raise invalid(f"The hyperparameter {name!r} is both static and tunable: remove it from StaticHyperParameters.")
    for space in found:
        if space.kind != "Categorical":
            _check_numbers(space)


def _check_numbers(space: Dimension) -> None:
    name, item, scaling = space.name, space.item, space.item.get("ScalingType", "Auto")
    try:
        low, high = float(item["MinValue"]), float(item["MaxValue"])
    except ValueError as error:
        raise invalid(f"The range of {name!r} is not numeric: {item['MinValue']!r} to {item['MaxValue']!r}.") from error
    if not (math.isfinite(low) and math.isfinite(high)):
        raise invalid(f"The range of {name!r} is not finite: {item['MinValue']} to {item['MaxValue']}.")
    if low > high:
        raise invalid(f"The range of {name!r} is empty: MinValue {item['MinValue']} is greater than MaxValue {item['MaxValue']}.")
    if space.kind == "Integer" and not (low.is_integer() and high.is_integer()):
        raise invalid(f"The integer range of {name!r} goes from {item['MinValue']} to {item['MaxValue']}: give whole numbers.")
    if scaling == "Logarithmic" and low <= 0:
        raise invalid(f"Logarithmic scaling of {name!r} needs MinValue > 0, got {item['MinValue']}.")
    if scaling == "ReverseLogarithmic" and not (space.kind == "Continuous" and low >= 0 and high < 1):
        raise invalid(f"ReverseLogarithmic scaling of {name!r} needs a continuous range with 0 <= MinValue and MaxValue < 1.")
