"""A network's last feature map as a second output, where a class activation map can be made of it."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.nn import functional

_PASSED = (nn.Dropout, nn.Flatten, nn.Identity)


def with_feature_map(network: nn.Module) -> tuple[nn.Module, nn.Linear] | None:
    """``(network that answers (logits, feature map (B, D, H, W)), its last layer)``.

    None for networks that do not end in global average pooling and a linear layer (ViT, MobileNetV3, ConvNeXt …), or that
    torch.fx cannot follow.
    """
    try:
        traced = fx.symbolic_trace(network)
    except Exception:  # fx raises kinds of its own for control flow that depends on the data
        return None
    output = next(node for node in traced.graph.nodes if node.op == "output")
    last = output.args[0]
    linear = _module(traced, last)
    if not isinstance(linear, nn.Linear):
        return None
    pooled = last.args[0]
    while _is_passed(traced, pooled):
        pooled = pooled.args[0]
    if not _is_global_pooling(traced, pooled):
        return None
    output.args = ((last, pooled.args[0]),)
    traced.recompile()
    return traced, linear


def _module(traced: fx.GraphModule, node: object) -> nn.Module | None:
    if isinstance(node, fx.Node) and node.op == "call_module":
        return traced.get_submodule(str(node.target))
    return None


def _is_passed(traced: fx.GraphModule, node: object) -> bool:
    """Whether a node only changes the shape, or nothing at all in evaluation."""
    if not isinstance(node, fx.Node):
        return False
    if isinstance(_module(traced, node), _PASSED):
        return True
    return node.target in (torch.flatten, "flatten", functional.dropout)


def _is_global_pooling(traced: fx.GraphModule, node: object) -> bool:
    """Whether a node is the mean over height and width."""
    if not isinstance(node, fx.Node):
        return False
    module = _module(traced, node)
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return module.output_size in (1, (1, 1))
    if node.target is functional.adaptive_avg_pool2d:
        return node.args[1] in (1, (1, 1))
    return False
