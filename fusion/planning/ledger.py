"""An account of the tensors that are alive while a step runs on tensors without values.

Under a FakeTensorMode nothing is computed and nothing allocated, but every operation is dispatched
with true shapes and dtypes, in the forward and the backward pass alike. The ledger sees each new
storage and the moment it is freed.
"""

from __future__ import annotations

import math
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from data.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

Kind = Literal["state", "gradient", "working"]
Stage = Literal["forward", "backward", "update"]

aten = torch.ops.aten
RECURRENT = 16
"""Values that oneDNN keeps of each value of a recurrent layer's output, as seen in its own calls:
15 to 16 at widths of 128 to 512, more at small ones, which it pads."""
RECURRENT_SCRATCH = 4
"""Values that it holds besides while it runs."""


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes alive of each kind, their highest sums in each stage, and FLOPs.

    Attributes:
        alive: Bytes alive now, by kind: weights, moments and inputs are `state`; `working` is what
            is neither they nor a gradient: activations and temporaries.
        working: Most bytes of `working` in each stage.
        growing: Most bytes of `working` and gradients together in each stage.
        flops: Multiplications and additions of matrix products, convolutions and attention.
    """

    def __init__(
        self, lengths: Sequence[int], scratch: Callable[[Any, Any, Any], int] | None = None
    ) -> None:
        """Account for a step over rows of these lengths.

        Args:
            lengths: Of the rows' series: the only values that a model may read.
            scratch: From an operation, its arguments and its result to the bytes that its kernel
                holds beside them while it runs.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: dict[Kind, int] = {"state": 0, "gradient": 0, "working": 0}
        self.working: dict[Stage, int] = {"forward": 0, "backward": 0, "update": 0}
        self.growing: dict[Stage, int] = {"forward": 0, "backward": 0, "update": 0}
        self.flops = 0
        self._stage: Stage = "forward"
        self._known: dict[int, tuple[weakref.ref[Any], int, Kind]] = {}
        self._scratch = scratch
        self._rows = len(lengths)
        self._steps = sum(lengths)
        # Made here: inside the mode it would have no values.
        counts = torch.tensor(lengths, dtype=torch.int64)
        steps = torch.arange(max(lengths, default=0))
        self._packed_sizes = (counts[None] > steps[:, None]).sum(1)

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """What runs inside belongs to this stage."""
        before, self._stage = self._stage, name
        self._note()
        yield
        self._stage = before

    def own(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Count tensors that are alive as of this kind from now on."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = id(storage)
            if key in self._known:
                reference, size, old = self._known[key]
                self.alive[old] -= size
                self.alive[kind] += size
                self._known[key] = (reference, size, kind)
            else:
                self._enter(storage, kind)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation; take note of what it made."""
        kwargs = kwargs or {}
        tensors = [
            value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)
        ]
        real = tensors and not any(isinstance(value, FakeTensor) for value in tensors)
        # A tensor made of numbers is real until it is lifted.
        if real and func is not aten.lift_fresh.default:
            with unset_fake_temporarily():
                return func(*args, **kwargs)  # on the sizes of packed steps
        out = self._run(func, args, kwargs)
        formula = _FORMULAS.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        for value in tree_leaves(out):
            if isinstance(value, FakeTensor) and id(value.untyped_storage()) not in self._known:
                self._enter(value.untyped_storage(), "working")
        extra = self._scratch(func, args, out) if self._scratch is not None else 0
        if func is aten.mkldnn_rnn_layer.default:
            extra += RECURRENT_SCRATCH * size_of(out[0])
        elif func is aten.mkldnn_rnn_layer_backward.default:
            extra += RECURRENT_SCRATCH * size_of(args[7])
        self._note(extra)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operation's result; of those that need values, what stands for it."""
        if func is aten._pack_padded_sequence.default:
            return self._packed(args[0])
        if func is aten._local_scalar_dense.default and self._stage == "update":
            return 1.0  # an optimizer reads its count of steps
        if torch.Tag.data_dependent_output in func.tags:
            raise InputError(
                f"the model reads values of its tensors ({func}), so its memory cannot be reckoned "
                "without them; let its shapes follow from those of the batch"
            )
        out = func(*args, **kwargs)
        if func is aten.mkldnn_rnn_layer.default:
            # Fake kernels leave out what oneDNN keeps for the backward pass.
            return (*out[:3], out[0].new_empty(RECURRENT * out[0].numel()))
        return out

    def _packed(self, series: Tensor) -> tuple[Tensor, Tensor]:
        if len(series) != self._rows or series.shape[1] != len(self._packed_sizes):
            raise InputError(
                f"the model packs {tuple(series.shape[:2])} rows and steps, but the batch has "
                f"{self._rows} rows of up to {len(self._packed_sizes)} steps"
            )
        return series.new_empty(self._steps, series.shape[2]), self._packed_sizes

    def _enter(self, storage: Any, kind: Kind) -> None:
        key, size = id(storage), storage.nbytes()

        def freed(_: Any) -> None:
            _, size, kind = self._known.pop(key)
            self.alive[kind] -= size

        self._known[key] = (weakref.ref(storage, freed), size, kind)
        self.alive[kind] += size

    def _note(self, extra: int = 0) -> None:
        working = self.alive["working"] + extra
        stage = self._stage
        self.working[stage] = max(self.working[stage], working)
        self.growing[stage] = max(self.growing[stage], working + self.alive["gradient"])


class Packing(TorchFunctionMode):
    """Unpacks sequences by operations that need no values; torch's own writes through pointers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function of torch's."""
        if getattr(func, "__name__", "") != "_pad_packed_sequence":
            return func(*args, **(kwargs or {}))
        data, sizes, _, _, total = args
        rows, steps = int(sizes[0]), max(int(total), len(sizes))
        index = torch.zeros(len(data), dtype=torch.int64)
        padded = data.new_zeros(steps * rows, data.shape[1]).index_copy(0, index, data)
        return padded.view(steps, rows, -1).transpose(0, 1), torch.zeros(rows, dtype=torch.int64)


@contextmanager
def keeping_inputs() -> Iterator[None]:
    """Linear layers keep their inputs for the backward pass, as under ZeRO-3.

    DeepSpeed replaces `torch.nn.functional.linear` (`memory_efficient_linear`), because autograd's
    own would keep the gathered weight. Its function keeps what it is given, before autocast's cast
    and where the weight is frozen too.
    """
    functional: Any = torch.nn.functional
    before, functional.linear = functional.linear, _linear_keeping
    try:
        yield
    finally:
        functional.linear = before


def _linear_keeping(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return _KeptLinear.apply(input, weight, bias)


class _KeptLinear(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        out = inputs.matmul(weight.t())
        return out if bias is None else out.add_(bias)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        (of_out,) = gradients
        rows = of_out.flatten(0, -2)
        of_inputs, of_weight, of_bias = ctx.needs_input_grad
        return (
            of_out.matmul(weight) if of_inputs else None,
            rows.t().matmul(inputs.flatten(0, -2)) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor."""
    return tensor.numel() * tensor.element_size()


def convolution_scratch(func: Any, args: Any, out: Any) -> int:
    """Bytes that oneDNN holds while it convolves plain (not channels-last) images on a CPU.

    It convolves in blocked layouts of its own: the operands are copied into them, and the result
    out of them.
    """
    if func not in (aten.convolution.default, aten.convolution_backward.default):
        return 0
    operands = [value for value in args if isinstance(value, FakeTensor) and value.dim() == 4]
    results = [value for value in tree_leaves(out) if isinstance(value, FakeTensor)]
    if any(value.is_contiguous(memory_format=torch.channels_last) for value in operands):
        return 0
    return sum(value.untyped_storage().nbytes() for value in (*operands, *results))


def _lstm_flops(series: Tensor, w0: Tensor, w1: Tensor, *args: Any, **kwargs: Any) -> int:
    """A layer: every step multiplies the input and the state with four gates' weights."""
    return 2 * math.prod(series.shape[:2]) * (w0.numel() + w1.numel())


def _lstm_backward_flops(*args: Any, **kwargs: Any) -> int:
    return 2 * _lstm_flops(*args)


_FORMULAS: dict[Any, Any] = {
    **flop_registry,
    aten.mkldnn_rnn_layer: _lstm_flops,
    aten.mkldnn_rnn_layer_backward: _lstm_backward_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
