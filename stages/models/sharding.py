"""Sharded training with PyTorch's FSDP2. The transformer blocks are sharded with their gradients and optimizer states.

The rest is replicated on every process: embeddings and output matrix (the loss is computed from the weight itself), norms, heads and
adapters.

A pass through a sharded model needs all processes, block by block. ``unsharded`` gathers the weights while each process works on its own,
e.g. in sampling: otherwise a process that finishes early would leave the others waiting forever.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from stages.errors import ModelError

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

BUCKET_VALUES = 16 * 2**20  # gradient values per all-reduce: 64 MiB in fp32


def shard(model: nn.Module, *, add_up: bool) -> None:
    """Shard the blocks of ``model`` over all processes, in place. Call on every process, with equal weights.

    ``add_up``: sum gradients over the processes instead of averaging them. The caller reduces the gradients of replicated parameters
    (``reduce_gradients``). Raises ModelError for quantized weights.
    """
    blocks = list(blocks_of(model))
    if not blocks and sharded_blocks(model):
        return  # the backbone was already sharded
    if any(not parameter.is_floating_point() for block in blocks for parameter in block.parameters()):
        raise ModelError("quantized weights cannot be sharded; remove quantization, or start without FSDP")
    if not blocks:
        raise ModelError(f"{type(model).__name__} has no blocks that can be sharded; start without FSDP")
    mesh = init_device_mesh(next(blocks[0].parameters()).device.type, (distributed.get_world_size(),))
    for block in blocks:
        # Each block is a root for FSDP, which would keep a root gathered after its forward pass.
        sharded = fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=_replicated_parameters(block))
        sharded.set_force_sum_reduction_for_comms(True)  # gloo (on CPUs) supports only sums
        if add_up:
            sharded.set_gradient_divide_factor(1.0)
    _release_files(model)


@torch.no_grad()
def _release_files(model: nn.Module) -> None:
    """Copy the replicated CPU weights of ``model``. safetensors maps files into memory, and one tensor of a file keeps all of it there."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and not hasattr(parameter, "full_tensor"):
            parameter.data = parameter.data.clone()


def _replicated_parameters(block: nn.Module) -> set[nn.Parameter]:
    """The adapters of a block: trainable parameters if the block is mostly frozen, and parameters of a minority dtype."""
    parameters = list(block.parameters())
    sizes: Counter[torch.dtype] = Counter()
    for parameter in parameters:
        sizes[parameter.dtype] += parameter.numel()
    (most, _), *_ = sizes.most_common(1)
    trains = {parameter for parameter in parameters if parameter.requires_grad}
    return {parameter for parameter in parameters if parameter.dtype != most} | (trains if len(trains) < len(parameters) else set())


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """The transformer blocks of a model, at any depth."""
    names: set[str] = set()
    for module in model.modules():
        names.update(getattr(module, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if blocks or sharded_blocks(model):
        return iter(blocks)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return iter(max(lists, key=lambda members: sum(parameter.numel() for parameter in members.parameters()), default=[]))


def sharded_blocks(model: nn.Module) -> list[FSDPModule]:
    """The blocks that ``shard`` has sharded."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def gathers_in_passes(model: nn.Module) -> bool:
    """Whether a forward pass may need all processes, because it gathers weights that FSDP or DeepSpeed's ZeRO-3 has sharded."""
    return bool(sharded_blocks(model)) or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def unsharded(*models: nn.Module | None) -> Iterator[None]:
    """Context manager that gathers all weights of ``models`` on every process, so that passes need no communication.

    Call on every process.
    """
    with ExitStack() as stack:
        for model in models:
            if model is not None and (blocks := sharded_blocks(model)):
                stack.enter_context(_unsharded_blocks(blocks))
        yield


@contextmanager
def _unsharded_blocks(blocks: list[FSDPModule]) -> Iterator[None]:
    for block in blocks:
        block.set_reshard_after_forward(False)
        block.unshard()
    try:
        yield
    finally:
        for block in blocks:
            block.set_reshard_after_forward(True)
            block.reshard()


def in_lockstep(groups: list[list[int]], device: torch.device) -> list[list[int]]:
    """``groups`` with the last one repeated until every process has the same number of passes. Call on every process.

    All processes take part in each pass through a sharded model. A repeated pass computes the same values again.
    """
    count = torch.tensor(len(groups), device=device)
    distributed.all_reduce(count, op=distributed.ReduceOp.MAX)
    return groups + [groups[-1]] * (int(count) - len(groups))


@torch.no_grad()
def reduce_gradients(model: nn.Module, *, average: bool = False) -> None:
    """All-reduce (sum or mean) the gradients of replicated trainable parameters. FSDP reduces those of sharded parameters."""
    gradients = []
    for parameter in model.parameters():
        if parameter.requires_grad and not is_sharded(parameter):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        # One all-reduce for many tensors, because each one costs a round trip.
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        distributed.all_reduce(flat)
        if average:
            flat /= distributed.get_world_size()
        for gradient, reduced in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(reduced.view_as(gradient))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Group consecutive tensors of one dtype, up to ``BUCKET_VALUES`` values per group."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(map(Tensor.numel, bucket)) + tensor.numel() > BUCKET_VALUES):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is sharded, so that this process has only a part of it."""
    return hasattr(tensor, "device_mesh")


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; a replicated tensor itself."""
    return cast("DTensor", tensor).to_local() if is_sharded(tensor) else tensor


def _full(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all processes; a replicated tensor itself."""
    return cast("DTensor", tensor).full_tensor() if is_sharded(tensor) else tensor


def grouped(parameters: Iterable[nn.Parameter]) -> list[dict[str, list[nn.Parameter]]]:
    """Optimizer parameter groups: sharded and replicated parameters separately, because fused kernels cannot mix them."""
    members = list(parameters)
    sides = [[parameter for parameter in members if is_sharded(parameter) == sharded] for sharded in (False, True)]
    return [{"params": side} for side in sides if side]


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float | None) -> float:
    """The global norm of all gradients, including shards on other processes. Scales the gradients down if the norm exceeds ``limit``."""
    norm = gradient_norm(parameters)
    scale_gradients(parameters, norm, limit)
    return float(norm)


@torch.no_grad()
def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The norm of all gradients, including parts on other processes. It is a scalar on their device, so the CPU does not wait for it."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros((), device=parameters[0].device if parameters else None)
    if not any(map(is_sharded, gradients)):
        return nn.utils.get_total_norm(gradients)
    squares = {sharded: [_square(gradient) for gradient in gradients if is_sharded(gradient) == sharded] for sharded in (False, True)}
    of_parts = torch.stack(squares[True]).sum()
    distributed.all_reduce(of_parts)
    return (of_parts + torch.stack(squares[False]).sum() if squares[False] else of_parts).sqrt()


def _square(gradient: Tensor) -> Tensor:
    return _local(gradient).double().square().sum()


@torch.no_grad()
def scale_gradients(parameters: Sequence[nn.Parameter], norm: Tensor, limit: float | None) -> None:
    """Scale the gradients down if their ``norm`` exceeds ``limit``, as torch.nn.utils.clip_grad_norm_ does."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if limit is None or not gradients:
        return
    if not any(map(is_sharded, gradients)):
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        _local(gradient).mul_(factor)


def unsharded_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """The unsharded state dict on the CPU; None if nothing is sharded. Call on every process."""
    if not sharded_blocks(model):
        return None
    return {name: _full(value).detach().cpu() for name, value in model.state_dict().items()}
