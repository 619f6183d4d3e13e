"""What a rule says of a training, and the names of all rules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TRAINING_RULES = (
    "VanishingGradient",
    "ExplodingTensor",
    "DeadRelu",
    "PoorWeightInitialization",
    "LossNotDecreasing",
    "Overfit",
    "Overtraining",
    "ClassImbalance",
    "UpdateRatioTooSmall",
    "UpdateRatioTooLarge",
)
PROFILER_RULES = (
    "BatchSize",
    "CPUBottleneck",
    "Dataloader",
    "GPUMemoryIncrease",
    "IOBottleneck",
    "LoadBalancing",
    "LowGPUUtilization",
    "MaxInitializationTime",
    "OverallFrameworkMetrics",
    "OverallSystemUsage",
    "StepOutlier",
)


@dataclass(frozen=True)
class Finding:
    """What one rule says. ``steps``: the training steps at which the symptom was seen."""

    rule: str
    triggered: bool
    detail: str
    remedy: str = ""
    steps: list[int] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    threshold: str = ""
    source: str = ""

    def to_json(self) -> dict[str, Any]:
        """The part of the report, in the managed report's words."""
        return {
            "RuleName": self.rule,
            "RuleTriggered": int(self.triggered),
            "Violations": len(self.steps) if self.steps else int(self.triggered),
            "Detail": self.detail,
            "Remedy": self.remedy,
            "Steps": self.steps[:50],
            "Details": self.values,
            "Threshold": self.threshold,
            "Source": self.source,
        }
