"""Models and tensors that have sizes and no content, on a fake GPU beside a fake host.

torch's fake tensors go through the program's own code, and nothing is computed. The GPU is `cpu:0`, the host is
`cpu`: two devices that torch tells apart wherever it compares them, and refuses to mix, while all of it runs where
torch has no CUDA. Rejected: fake "cuda" tensors, which abort the process there, and "meta", on which attention takes
another path and other memory. What CUDA does otherwise than a CPU is put right here, in one place: flash attention's
workspace, and (`as_on_cuda`) optimizers that step all weights at once.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch._subclasses import FakeTensor, FakeTensorMode

from cogvideox_factory.memory.tracker import MemoryTracker
from cogvideox_factory.model.denoiser import forget_positions

GPU = torch.device("cpu", 0)
HOST = torch.device("cpu")

_aten = torch.ops.aten
_ask_device = torch.ops.prim.device.default
_HALF = (torch.float16, torch.bfloat16)


_LAYERS = (torch.nn.Linear, torch.nn.Embedding, torch.nn.modules.conv._ConvNd)


@contextlib.contextmanager
def fake_world() -> Iterator[None]:
    """Inside, every new tensor is a fake."""
    forget_positions()
    gc.freeze()  # what is there already, modules above all, need not be looked through each time
    try:
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            mock.patch.object(torch.nn.Module, "_apply", _replace),
            mock.patch.object(FakeTensor, "data", property(_content, _set_content), create=True),
        ):
            yield
    finally:
        gc.unfreeze()
        forget_positions()  # those inside are fakes


class FakeTracker(MemoryTracker):
    """Counts what lives on the fake GPU and on the fake host."""

    entered: FakeTracker | None = None

    def __init__(self) -> None:
        super().__init__(GPU)

    def __enter__(self) -> FakeTracker:
        FakeTracker.entered = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        FakeTracker.entered = None
        super().__exit__(*error)

    def run(self, func, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A number that the program asks a fake tensor for is 1: what depends on it is no size.

        Devices, which torch asks for more often than for all else together, are answered without the detour.
        """
        if func is _ask_device and isinstance(args[0], FakeTensor) and not args[0].fake_mode.in_kernel_invocation:
            return args[0].fake_device
        if func is _aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        return func(*args, **kwargs)

    def device_of(self, tensor: torch.Tensor) -> torch.device:
        return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device

    def workspace(self, func, args: tuple[Any, ...]) -> int:
        """FlashAttention-2 sums the gradient of the queries in fp32, and keeps a fp32 number a row of them."""
        if func is not _aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            return 0
        query = args[1]
        if query.dtype not in _HALF:  # another kernel, which needs none
            return 0
        batch, heads, tokens, width = query.shape
        rows = math.ceil(tokens / 128) * 128
        return batch * heads * rows * (width + 1) * torch.float32.itemsize


def build(make: Callable[[], Any], dtype: torch.dtype) -> Any:
    """A frozen model on the host whose weights come to be in this type, as `from_pretrained` makes it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with contextlib.ExitStack() as stack:
            for layer in _LAYERS:  # to fill what has no content takes longer than all else
                stack.enter_context(mock.patch.object(layer, "reset_parameters", lambda self: None))
            return make().requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)


def as_on_cuda(optimizer: torch.optim.Optimizer) -> None:
    """Let torch's own optimizers step all weights together, which is their default on CUDA alone."""
    for group in optimizer.param_groups:
        if "foreach" in group and not group.get("fused"):
            group["foreach"] = True


def _content(tensor: FakeTensor) -> torch.Tensor:
    return torch.Tensor.data.__get__(tensor)  # type: ignore[attr-defined]


def _set_content(tensor: FakeTensor, value: torch.Tensor) -> None:
    """`tensor.data = value` moves a tensor to where the value is, which torch leaves out for fakes."""
    torch.Tensor.data.__set__(tensor, value)  # type: ignore[attr-defined]
    if isinstance(value, FakeTensor):
        tensor.fake_device = value.fake_device


def _replace(module: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    """`Module._apply`, by which modules move; torch's own cannot exchange the content of a fake parameter.

    What moves is weights, whenever it does.
    """
    tracker = FakeTracker.entered
    with torch.no_grad(), tracker.part("weights") if tracker else contextlib.nullcontext():
        changed: dict[torch.Tensor, torch.nn.Parameter] = {}  # one that belongs to several modules stays one
        for owner in module.modules() if recurse else (module,):
            for name, parameter in owner._parameters.items():
                if parameter is None:
                    continue
                if parameter not in changed:
                    value = change(parameter)
                    is_same = value is parameter
                    changed[parameter] = parameter if is_same else torch.nn.Parameter(value, parameter.requires_grad)
                owner._parameters[name] = changed[parameter]
            for name, buffer in owner._buffers.items():
                if buffer is not None:
                    owner._buffers[name] = change(buffer)
    return module
