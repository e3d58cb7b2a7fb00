"""Weights cut over the processes by PyTorch's FSDP2: those of the transformer blocks, which are most of a model, with their gradients and
optimizer states. The rest is whole on every process: embeddings and output matrix (whose loss is worked out from the weight itself), norms,
heads, and adapters.

Every pass through a sharded model needs all processes, block by block. ``whole`` puts the weights together for a stretch in which each
process goes its own way: sampling, where one is done before another, would otherwise wait for ever.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from stages.errors import ModelError

BUCKET_NUMBERS = 16 * 2**20  # gradients that are exchanged together: 64 MiB in fp32


def shard(model: nn.Module, *, add_up: bool) -> None:
    """Cut the blocks of ``model`` over all processes, in place. Call on every process, with equal weights.

    ``add_up``: gradients are summed over the processes; else averaged. Those of parameters that stay whole are left to the caller
    (``reduce_gradients``). Raises ModelError for quantized weights.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    blocks = list(blocks_of(model))
    if not blocks and sharded_blocks(model):
        return  # the backbone of a model that was cut before
    if any(not parameter.is_floating_point() for block in blocks for parameter in block.parameters()):
        raise ModelError("quantized weights cannot be cut over processes; leave out quantization, or start without FSDP")
    if not blocks:
        raise ModelError(f"{type(model).__name__} has no blocks that could be cut over processes; start without FSDP")
    mesh = init_device_mesh(next(blocks[0].parameters()).device.type, (distributed.get_world_size(),))
    for block in blocks:
        cut: Any = fully_shard(block, mesh=mesh, ignored_params=_kept_whole(block))
        cut.set_force_sum_reduction_for_comms(True)  # gloo, on CPUs, knows no other
        if add_up:
            cut.set_gradient_divide_factor(1.0)


def _kept_whole(block: nn.Module) -> set[nn.Parameter]:
    """The adapters of a block: what trains where most of it is frozen, and what has another dtype than most of it."""
    parameters = list(block.parameters())
    sizes: Counter[torch.dtype] = Counter()
    for parameter in parameters:
        sizes[parameter.dtype] += parameter.numel()
    (most, _), *_ = sizes.most_common(1)
    trains = {parameter for parameter in parameters if parameter.requires_grad}
    return {parameter for parameter in parameters if parameter.dtype != most} | (trains if len(trains) < len(parameters) else set())


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """The transformer blocks of a model, wherever they are inside it."""
    names: set[str] = set()
    for module in model.modules():
        names.update(getattr(module, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if found or sharded_blocks(model):
        return iter(found)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return iter(max(lists, key=lambda members: sum(parameter.numel() for parameter in members.parameters()), default=[]))


def sharded_blocks(model: nn.Module) -> list[Any]:
    """The blocks that ``shard`` has cut."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def whole(*models: nn.Module | None) -> Iterator[None]:
    """Inside, every process has all weights of ``models``, and passes through them wait for nobody. Call on every process."""
    with ExitStack() as stack:
        for model in models:
            if model is not None and (blocks := sharded_blocks(model)):
                stack.enter_context(_whole(blocks))
        yield


@contextmanager
def _whole(blocks: list[Any]) -> Iterator[None]:
    for block in blocks:
        block.set_reshard_after_forward(False)
        block.unshard()
    try:
        yield
    finally:
        for block in blocks:
            block.set_reshard_after_forward(True)
            block.reshard()


@torch.no_grad()
def reduce_gradients(model: nn.Module, *, average: bool = False) -> None:
    """Add up (or average) over all processes the gradients of trainable parameters that are whole; FSDP has done it for the others."""
    gradients = []
    for parameter in model.parameters():
        if parameter.requires_grad and not is_cut(parameter):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        # One exchange for many tensors: each costs a round trip, however small it is.
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        distributed.all_reduce(flat)
        if average:
            flat /= distributed.get_world_size()
        for gradient, reduced in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(reduced.view_as(gradient))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, up to ``BUCKET_NUMBERS`` numbers together."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(map(Tensor.numel, bucket)) + tensor.numel() > BUCKET_NUMBERS):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def is_cut(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    return hasattr(tensor, "device_mesh")


def grouped(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: those that are cut apart from those that are whole, since no fused kernel takes both at once."""
    members = list(parameters)
    sides = [[parameter for parameter in members if is_cut(parameter) == cut] for cut in (False, True)]
    return [{"params": side} for side in sides if side]


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float | None) -> float:
    """The norm of all gradients together, parts on other processes included; scaled down to ``limit`` where it is above it."""
    norm = gradient_norm(parameters)
    scale_gradients(parameters, norm, limit)
    return float(norm)


@torch.no_grad()
def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The norm of all gradients together, parts on other processes included: a scalar on their device, which nobody waits for."""
    gradients: list[Any] = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros((), device=parameters[0].device if parameters else None)
    if not any(map(is_cut, gradients)):
        return nn.utils.get_total_norm(gradients)
    squares = {cut: [_square(gradient) for gradient in gradients if is_cut(gradient) == cut] for cut in (False, True)}
    of_parts = torch.stack(squares[True]).sum()
    distributed.all_reduce(of_parts)
    return (of_parts + torch.stack(squares[False]).sum() if squares[False] else of_parts).sqrt()


def _square(gradient: Any) -> Tensor:
    return (gradient.to_local() if is_cut(gradient) else gradient).double().square().sum()


@torch.no_grad()
def scale_gradients(parameters: Sequence[nn.Parameter], norm: Tensor, limit: float | None) -> None:
    """Scale gradients of this ``norm`` down to ``limit`` where it is above it, as torch.nn.utils.clip_grad_norm_ does."""
    gradients: list[Any] = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if limit is None or not gradients:
        return
    if not any(map(is_cut, gradients)):
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        (gradient.to_local() if is_cut(gradient) else gradient).mul_(factor)


def whole_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """The state dict with every tensor whole, on the CPU; None where nothing is cut. Call on every process."""
    if not sharded_blocks(model):
        return None
    state: dict[str, Any] = model.state_dict()
    return {name: (value.full_tensor() if is_cut(value) else value).detach().cpu() for name, value in state.items()}
