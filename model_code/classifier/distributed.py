"""The processes of one training: ``torchrun`` starts them (the training toolkit calls it), this module lets them agree.

Without torchrun there is one process and every function here does nothing. See https://docs.pytorch.org/docs/stable/elastic/run.html
"""

from __future__ import annotations

import gc
import os
from typing import Any

import torch
from torch import Tensor, distributed


def start() -> None:
    """Join the processes that torchrun started: NCCL between GPUs, gloo between CPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        # Its functions take the group of all processes as their default at import. DistributedDataParallel imports them, and would
        # do so when that group exists: they would hold it, and gloo's threads, beyond ``stop``.
        from torch.distributed import nn  # noqa: F401

        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def stop() -> None:
    """Leave the group together: a process that is still waiting for one that has gone is aborted.

    The group ends with its last holder, so the networks that average gradients in it go first. Its threads end with it: one of
    gloo's that still has a tensor to let go of when the interpreter ends aborts the process, after a training that went well
    (https://github.com/pytorch/pytorch/pull/179291).
    """
    if distributed.is_initialized():
        distributed.barrier()
        gc.collect()
        distributed.destroy_process_group()


def rank() -> int:
    """This process's number, from 0, over all machines."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def size() -> int:
    """Number of processes over all machines."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes checkpoints, metrics and the model."""
    return rank() == 0


def is_first_here() -> bool:
    """Whether this is the first process of its machine: the one that samples the system."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def total(values: Tensor) -> Tensor:
    """Sum over all processes, in place."""
    if distributed.is_initialized():
        distributed.all_reduce(values)
    return values


def any_true(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process."""
    if not distributed.is_initialized():
        return flag
    return bool(total(torch.tensor(int(flag), device=device)).item())


def from_main(value: Any) -> Any:
    """The main process's value, in all processes."""
    if not distributed.is_initialized():
        return value
    held = [value]
    distributed.broadcast_object_list(held, src=0)
    return held[0]


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank, in all processes."""
    if not distributed.is_initialized():
        return [value]
    found: list[Any] = [None] * size()
    distributed.all_gather_object(found, value)
    return found


def share(count: int) -> slice:
    """This process's part of ``count`` things; parts differ by one at most."""
    each, more = divmod(count, size())
    start = rank() * each + min(rank(), more)
    return slice(start, start + each + (rank() < more))
