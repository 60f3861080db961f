"""An optimizer of any kind that steps in fp32, whatever the type and the place of the weights that compute.

bf16 keeps 8 significant bits, so that an update of less than 1/512 of a weight rounds to nothing, and most updates of
a fine-tuning are smaller. Two ways out: fp32 *master weights* beside the bf16 copy that computes, or a fp32 copy for
the moment of the step and *stochastic rounding* back, which is right on average (Gupta et al. 2015,
https://arxiv.org/abs/1502.02551). With the optimizer on the host, masters and states lie there. Steps can be taken
within the backward pass, so that the gradients of all weights are never there together (Lv et al. 2023, LOMO,
https://arxiv.org/abs/2306.09782).

Rejected: torchao's `bf16_stochastic_round`, which only its Adam has, which draws from the global generator (ranks
would drift apart), and whose unquantized states would be bf16. torchao's `CPUOffloadOptimizer`, which copies gradients
to the host as they arrive: clipping and the average over ranks then come too late, and bf16 weights stay plain bf16.
"""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Parameter

PIECE = 1 << 23  # numbers that are converted or rounded at a time, so that temporary copies stay small


class OnGradient(enum.Enum):
    """What an optimizer in the backward pass does with a gradient as soon as it is there."""

    KEEP = enum.auto()  # adds it to those of earlier batches, on the host where the states are there
    MEASURE = enum.auto()  # keeps its norm and drops it
    STEP = enum.auto()  # steps its weight, with the gradients that were kept added, and drops them


class Fp32Steps(torch.optim.Optimizer):
    """An optimizer over fp32 stand-ins of the model's weights; `param_groups` and `state` are the inner optimizer's.

    A stand-in is a master, kept all the time; or, with stochastic rounding, filled for the step alone. Weights are
    stepped one after the other where the optimizer allows it, so that no second set of gradients ever exists.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        build: Callable[[list[Parameter]], torch.optim.Optimizer],
        *,
        stochastic_rounding: bool = False,
        on_host: bool = False,
        offload_gradients: bool = False,
        one_by_one: bool = True,
        in_backward: bool = False,
    ):
        """`build` makes the inner optimizer, with one parameter group. `on_host`: masters and states are in the
        host's memory. `offload_gradients`: gradients go there too, each as soon as the backward pass has made it.
        `one_by_one` is false for an optimizer whose step looks at all weights together. `in_backward`: each weight is
        stepped as soon as the backward pass has made its gradient, where `backward_passes` does not say otherwise."""
        assert one_by_one or not in_backward
        self._rounds_stochastically = stochastic_rounding
        self._on_host = on_host
        self._one_by_one = one_by_one
        self._stand_ins = {parameter: self._stand_in(parameter) for parameter in parameters}
        self._inner = build(list(self._stand_ins.values()))
        assert len(self._inner.param_groups) == 1
        self._number_of = {parameter: number for number, parameter in enumerate(parameters)}
        self._num_steps = 0
        self._generators: dict[torch.device, torch.Generator] = {}
        self._host_gradients: dict[Parameter, torch.Tensor] = {}
        self._in_backward = in_backward
        self._on_gradient = OnGradient.STEP
        self._norms: dict[Parameter, torch.Tensor] = {}  # of the gradients of this step that are gone
        self._clip: Callable[[Parameter], None] | None = None
        # Held weakly: a parameter keeps its hooks where the garbage collector does not see them, and this object keeps
        # the parameters, so that otherwise none of them would ever go.
        take = weakref.WeakMethod(self._take_gradient if in_backward else self._move_gradient)
        for parameter in parameters if offload_gradients or in_backward else ():
            parameter.register_post_accumulate_grad_hook(lambda parameter: _call(take, parameter))

    @property
    def in_backward(self) -> bool:
        return self._in_backward

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self._inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self._inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self._inner.defaults

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's, which another run may load into that optimizer itself, and the number of steps.

        Without the masters: they are the trained weights of a checkpoint, and are not written twice.
        """
        return {**self._inner.state_dict(), "num_steps": self._num_steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._num_steps = state_dict.get("num_steps", 0)
        self._inner.load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})

    def held_weight(self, parameter: Parameter) -> torch.Tensor:
        """What is trained of a parameter of the model: its master, where it has one."""
        return parameter if self._is_filled_for_the_step(parameter) else self._stand_ins[parameter]

    def set_held_weight(self, parameter: Parameter, value: torch.Tensor) -> None:
        """Set what is trained of a parameter, and the parameter."""
        held = self.held_weight(parameter).detach()
        held.copy_(value)
        parameter.detach().copy_(held)

    def backward_passes(self, batch: int, num_batches: int, limit: float) -> Iterator[None]:
        """Yields once for each forward and backward pass that a batch (0, 1, …) of a step takes, and sees to what
        becomes of its gradients. `limit` is the norm to which the step's gradients are clipped, or infinity.

        An optimizer outside of the backward pass takes one, and steps in `step`. In the backward pass:

        - One batch, no clipping: each weight is stepped as its gradient comes.
        - One batch, clipping: the first pass measures the norm, the second repeats it with the same random numbers and
          steps each weight with its gradient scaled. There is no second one where the norm is not finite.
        - Several batches, no clipping: gradients are kept and added up; in the last batch's pass each weight is stepped
          as its sum is complete.
        - Several batches, clipping: all sums have to be there before one of them may be used. They are kept, and used
          up weight by weight in `step`; one pass a batch is enough.
        """
        if not self._in_backward:
            yield
            return
        clips = limit < float("inf")
        if num_batches > 1 and (clips or batch + 1 < num_batches):
            self._on_gradient = OnGradient.KEEP
            yield
            return
        if clips:
            self._on_gradient = OnGradient.MEASURE
            devices = {parameter.device for parameter in self._stand_ins if parameter.device.type == "cuda"}
            with torch.random.fork_rng(devices):  # for dropout; noise and timesteps belong to the clip
                yield
            norm = self.norm_of_dropped_gradients()
            if norm is not None and not norm.isfinite():  # what is waited for here decides whether there is an update
                return
            if norm is not None:
                self._clip = lambda parameter: torch.nn.utils.clip_grads_with_norm_(parameter, limit, norm)
        self._on_gradient = OnGradient.STEP
        yield

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient; the gradients are used up."""
        assert closure is None
        stepping = [
            (parameter, stand_in)
            for parameter, stand_in in self._stand_ins.items()
            if parameter.grad is not None or parameter in self._host_gradients
        ]
        for pairs in [[pair] for pair in stepping] if self._one_by_one else [stepping]:
            self._step(pairs)
        self._num_steps += 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        assert set_to_none
        self._host_gradients.clear()
        self._on_gradient = OnGradient.STEP
        self._norms.clear()
        self._clip = None
        for parameter in self._stand_ins:
            parameter.grad = None

    def norm_of_dropped_gradients(self) -> torch.Tensor | None:
        """The norm of this step's gradients together, where they are gone already; None where they are not.

        As `clip_grad_norm_` finds it: the norm of the norms, in the order of the weights.
        """
        return torch.nn.utils.get_total_norm(self._in_order(self._norms)) if self._norms else None

    @torch.no_grad()
    def clip_host_gradients(self, limit: float) -> torch.Tensor | None:
        """Scale gradients that are on the host down to a common norm, as `clip_grad_norm_` does; the norm before.

        None where there are none."""
        if not self._host_gradients:
            return None
        gradients = self._in_order(self._host_gradients)
        norm = torch.nn.utils.get_total_norm(gradients)
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale)
        return norm

    def _in_order(self, of_parameters: Mapping[Parameter, torch.Tensor]) -> list[torch.Tensor]:
        """Values in the order of the weights, in which the norm of all is summed."""
        return [of_parameters[parameter] for parameter in self._stand_ins if parameter in of_parameters]

    def _is_filled_for_the_step(self, parameter: Parameter) -> bool:
        return self._rounds_stochastically and parameter.dtype == torch.bfloat16

    def _stand_in(self, parameter: Parameter) -> Parameter:
        assert parameter.dtype in (torch.float32, torch.bfloat16), parameter.dtype
        device = torch.device("cpu") if self._on_host else parameter.device
        if self._is_filled_for_the_step(parameter):
            return Parameter(torch.empty(0, device=device))
        if parameter.dtype == torch.float32 and parameter.device == device:
            return parameter
        return Parameter(_in_fp32(parameter.detach(), device))

    def _move_gradient(self, parameter: Parameter) -> None:
        """After the backward pass of a parameter: its gradient goes to the host, added to that of earlier batches."""
        assert parameter.grad is not None
        gradient, earlier = parameter.grad.to("cpu"), self._host_gradients.get(parameter)
        self._host_gradients[parameter] = gradient if earlier is None else earlier.add_(gradient)
        parameter.grad = None

    @torch.no_grad()
    def _take_gradient(self, parameter: Parameter) -> None:
        """After the backward pass of a parameter, with the optimizer in it."""
        keeps = self._on_gradient == OnGradient.KEEP
        if parameter in self._host_gradients or (keeps and self._on_host):
            self._move_gradient(parameter)
        if keeps:
            return
        if self._clip is None:
            assert parameter not in self._norms, "a second pass, without `backward_passes`"
            gradient = self._host_gradients.get(parameter, parameter.grad)
            assert gradient is not None
            self._norms[parameter] = torch.nn.utils.get_total_norm([gradient])
        else:
            self._clip(parameter)
        if self._on_gradient == OnGradient.MEASURE:
            parameter.grad = None
        else:
            self._step([(parameter, self._stand_ins[parameter])])

    def _step(self, pairs: list[tuple[Parameter, Parameter]]) -> None:
        for parameter, stand_in in pairs:
            self._fetch(parameter, stand_in)
        with self._only([stand_in for _, stand_in in pairs]):
            self._inner.step()
        for parameter, stand_in in pairs:
            self._give_back(parameter, stand_in)

    def _fetch(self, parameter: Parameter, stand_in: Parameter) -> None:
        gradient = self._host_gradients.pop(parameter, parameter.grad)
        assert gradient is not None
        parameter.grad = None
        if self._is_filled_for_the_step(parameter):
            stand_in.data = _in_fp32(parameter.detach(), stand_in.device)
        stand_in.grad = _in_fp32(gradient, stand_in.device)

    def _give_back(self, parameter: Parameter, stand_in: Parameter) -> None:
        stand_in.grad = None
        if self._is_filled_for_the_step(parameter):
            generator = self._generator(parameter, stand_in.device)
            for piece, exact in _pieces(parameter, stand_in.detach()):
                piece.copy_(round_stochastically(exact, generator))
            stand_in.data = torch.empty(0, device=stand_in.device)
        elif stand_in is not parameter:
            _copy(parameter, stand_in.detach())

    def _generator(self, parameter: Parameter, device: torch.device) -> torch.Generator:
        """Seeded by the numbers of step and weight: the same on every rank, after a resume, and in whatever order the
        weights are stepped."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        return self._generators[device].manual_seed(self._num_steps << 20 | self._number_of[parameter])

    @contextmanager
    def _only(self, stand_ins: list[Parameter]) -> Iterator[None]:
        """The inner optimizer sees these parameters alone."""
        (group,) = self._inner.param_groups
        everything, group["params"] = group["params"], stand_ins
        try:
            yield
        finally:
            group["params"] = everything


def _pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same rows of tensors of one shape, of about `PIECE` numbers at a time."""
    rows = [torch.atleast_1d(tensor) for tensor in tensors]
    height = max(1, PIECE * len(rows[0]) // max(1, rows[0].numel()))
    return zip(*(each.split(height) for each in rows), strict=True)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Between devices, numbers travel in the narrower type, converted piece by piece on either side.

    torch would convert all of them at once where they come from, which takes the GPU a whole fp32 copy.
    """
    if target.device == source.device:
        target.copy_(source)
        return
    narrower = min(target.dtype, source.dtype, key=lambda dtype: dtype.itemsize)
    for piece, part in _pieces(target, source):
        piece.copy_(part.to(narrower).to(target.device))


def _in_fp32(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A fp32 copy on a device; the tensor itself where it is one."""
    if tensor.dtype == torch.float32 and tensor.device == device:
        return tensor
    copy = torch.empty_like(tensor, dtype=torch.float32, device=device)
    _copy(copy, tensor)
    return copy


def _call(method: weakref.WeakMethod[Any], parameter: Parameter) -> None:
    bound = method()
    if bound is not None:
        bound(parameter)


def round_stochastically(values: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """fp32 values as bf16, up or down by chance, so that the mean over many roundings is the value itself.

    bf16 is the upper half of a fp32 number: adding a random lower half carries over as often as it should.
    """
    bits = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    rounded = bits.add_(values.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).bfloat16()  # a NaN must not carry over into a number


def held_weights(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Parameter]) -> dict[str, torch.Tensor]:
    """Trained weights as the optimizer holds them: masters where there are any, else the model's own."""
    hold: Callable[[Parameter], torch.Tensor] = getattr(optimizer, "held_weight", lambda parameter: parameter)
    return {name: hold(parameter).detach() for name, parameter in parameters.items()}


@torch.no_grad()
def set_weights(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Parameter], values: Mapping[str, torch.Tensor]
) -> None:
    """Put saved `held_weights` back, into the masters and into the model."""
    for name, parameter in parameters.items():
        if hasattr(optimizer, "set_held_weight"):
            optimizer.set_held_weight(parameter, values[name])
        else:
            parameter.copy_(values[name])
