"""How a model lies on the processes of a training: whole on each, or divided among them (FSDP2).

    accelerate launch --multi_gpu --num_processes 2 -m pennyweight train RECIPE.yaml                   # whole
    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2 -m pennyweight train RECIPE.yaml   # divided

Divided, each process holds its rows of every parameter, gradient, average and state of the optimizer. A unit's
parameters are gathered before its forward and its backward pass, so whatever looks at weights there (scales, centring,
codes) sees whole ones and computes what it does on one process. The unit is the model, or each module of the classes
that `--fsdp_transformer_layer_cls_to_wrap` names, under `--fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP`.

The launcher's settings are accelerate's, the dividing is `torch.distributed.fsdp.fully_shard`, called here: accelerate
1.15 divides on accelerators only, and on CPUs takes --use_fsdp for plain data parallelism. Two things would not fit
here, besides: it refuses models with scalar parameters (a learned step), and it casts gathered weights to the precision
of the products, which a mean |w| would feel. Scalars stay whole on each process, their gradients averaged; mixed
precision is autocast, as on one process. torch's packages for this are imported where used, since they take long.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from ..errors import PlanError, require


class Replicated:
    """The whole model on each process: DistributedDataParallel, or nothing for one process."""

    divided = False

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator

    def place(self, model: nn.Module) -> None:
        """Put the model where it is trained; before its optimizer is made, and again at each stage."""

    def wrap(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """(what is called for the forward pass, what is stepped)."""
        return self.accelerator.prepare(model, optimizer)

    def unwrap(self, runner: Any) -> nn.Module:
        return self.accelerator.unwrap_model(runner, keep_fp32_wrapper=False)

    def part(self, runner: Any, last: bool) -> AbstractContextManager[None]:
        """Forward and backward of one part of an accumulated batch; gradients are averaged in the last."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(runner)

    def forward(self) -> AbstractContextManager[None]:
        """Around a call of the runner; accelerate's wrappers have autocast in them."""
        return contextlib.nullcontext()

    def begin_step(self, model: nn.Module) -> None:
        """Before the first forward pass of a step."""

    def end_backward(self, model: nn.Module) -> None:
        """After the last backward pass of a step: all gradients are averages over the processes from here on."""

    def clip(self, parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
        """Shorten the gradient to that norm at most; returns its norm before."""
        return torch.nn.utils.clip_grad_norm_(parameters, largest)

    @contextlib.contextmanager
    def evaluation(self, model: nn.Module) -> Iterator[None]:
        """The model computes the same on all processes: with process 0's batch statistics."""
        _broadcast_buffers(model)
        yield

    def whole(self, model: nn.Module) -> nn.Module:
        """The trained model as an ordinary one, on every process."""
        return model


class Divided(Replicated):
    """Rows of the parameters on each process: FSDP2. Gradients are reduced in every part of an accumulated batch."""

    divided = True

    def __init__(self, accelerator: Any, units: tuple[str, ...] = (), reshard_after_forward: bool = True) -> None:
        super().__init__(accelerator)
        self.units, self.reshard_after_forward = units, reshard_after_forward
        self.ordinary: nn.Module | None = None  # a copy on the CPU, to be filled when the training ends
        self.wrapped = False

    def place(self, model: nn.Module) -> None:
        if self.ordinary is not None:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        device = self.accelerator.device
        self.ordinary = copy.deepcopy(model.cpu())
        model.to(device)
        mesh = init_device_mesh(device.type, (self.accelerator.num_processes,))
        scalars = {p for p in model.parameters() if p.ndim == 0}
        for unit in self.units_of(model):
            fully_shard(unit, mesh=mesh, ignored_params=scalars, reshard_after_forward=self.reshard_after_forward)
        fully_shard(model, mesh=mesh, ignored_params=scalars)

    def units_of(self, model: nn.Module) -> list[nn.Module]:
        """The modules of the classes named, inner ones first. Raises PlanError for classes that the model lacks."""
        there = {type(module).__name__ for module in model.modules()}
        for name in self.units:
            if name not in there:
                raise PlanError(
                    f"--fsdp_transformer_layer_cls_to_wrap: no module is a {name}; there are: "
                    f"{', '.join(sorted(there))}"
                )
        return [module for module in reversed(list(model.modules())[1:]) if type(module).__name__ in self.units]

    def wrap(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        self.wrapped = True
        return model, self.accelerator.prepare_optimizer(optimizer)

    def unwrap(self, runner: Any) -> nn.Module:
        self.wrapped = False
        return runner

    def part(self, runner: Any, last: bool) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def forward(self) -> AbstractContextManager[None]:
        return self.accelerator.autocast() if self.wrapped else contextlib.nullcontext()

    def begin_step(self, model: nn.Module) -> None:
        _broadcast_buffers(model)  # as DistributedDataParallel does

    def end_backward(self, model: nn.Module) -> None:
        for p in model.parameters():
            if p.grad is not None and not is_divided(p):
                p.grad = self.accelerator.reduce(p.grad, "mean")

    def clip(self, parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
        return whole(self.accelerator.clip_grad_norm_(parameters, largest))

    @contextlib.contextmanager
    def evaluation(self, model: nn.Module) -> Iterator[None]:
        from torch.distributed.fsdp import FSDPModule

        _broadcast_buffers(model)
        with self.forward():
            yield
        for module in model.modules():  # the root keeps what it gathered until a backward pass, which does not come
            if isinstance(module, FSDPModule):
                module.reshard()

    def whole(self, model: nn.Module) -> nn.Module:
        assert self.ordinary is not None
        self.ordinary.load_state_dict(gathered(model.state_dict(), keep=True))
        return self.ordinary


def parallel_of_launch(accelerator: Any) -> Replicated:
    """What `accelerate launch` was asked for; raises PlanError for what is not to be had."""
    kind = accelerator.distributed_type.value
    if kind in ("DEEPSPEED", "MEGATRON_LM", "TP"):
        raise PlanError(f"{kind} is not supported; launch with --multi_gpu, or --use_fsdp --fsdp_version 2")
    if kind == "NO" or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return Replicated(accelerator)
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise PlanError("FSDP 1 is not supported; launch with --fsdp_version 2")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
        raise PlanError(f"FSDP needs PyTorch 2.7 or later, this is {torch.__version__}; launch with --multi_gpu")
    plugin = require("accelerate", "train").FullyShardedDataParallelPlugin(fsdp_version=2)
    refused = {
        "--fsdp_offload_params": type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy",
        "--fsdp_activation_checkpointing": plugin.activation_checkpointing,
        "--fsdp_ignored_modules": plugin.ignored_modules is not None,
        "--fsdp_auto_wrap_policy SIZE_BASED_WRAP": plugin.min_num_params is not None,
    }
    for flag, given in refused.items():
        if given:
            raise PlanError(f"{flag} is not supported; leave it out")
    return Divided(accelerator, tuple(plugin.transformer_cls_names_to_wrap or ()), bool(plugin.reshard_after_forward))


def is_divided(tensor: Any) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """A divided tensor gathered, any other as it is. Every process must take part, in the same order."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """All of them whole, divided ones on the CPU; {} on a process that does not keep them, but takes part."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            found[name] = full.cpu() if is_divided(tensor) else full
    return found


def placed(full: Tensor, like: Any) -> Tensor:
    """A whole tensor, the same on all processes, divided as `like` is if it has its shape; otherwise as it is."""
    if not is_divided(like) or full.shape != like.shape:
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def _broadcast_buffers(model: nn.Module) -> None:
    """Give every process the buffers of process 0, in one message for each dtype."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for buffer in model.buffers():
        kinds.setdefault(buffer.dtype, []).append(buffer)
    for buffers in kinds.values():
        message = torch.cat([buffer.reshape(-1) for buffer in buffers])
        torch.distributed.broadcast(message, 0)
        for buffer, part in zip(buffers, message.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))
