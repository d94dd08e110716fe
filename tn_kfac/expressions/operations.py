"""Operations by signature: a network builder with the arguments people know from torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from tn_kfac.tensor_network.convolution import Convolution, Padding, convolution
from tn_kfac.tensor_network.execute import einsum_expression, execute
from tn_kfac.tensor_network.network import Network
from tn_kfac.tensor_network.plan import plan


@dataclass(frozen=True)
class InputOperation:
    """An operation on a convolution's input alone; call it, or ask for its einsum."""

    build: Callable[[Convolution], Network]
    __doc__: str

    def network(
        self,
        x: Tensor,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Network:
        """The operation's tensor network, not simplified, of operand `x`."""
        conv = convolution(x.shape, kernel_size, stride, padding, dilation, groups)
        return self.build(conv)

    def einsum_expression(
        self,
        x: Tensor,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        simplify: bool = True,
    ) -> tuple[str, list[Tensor], tuple[int, ...]]:
        """(equation, operands, shape): `torch.einsum(equation, *operands).reshape(shape)`.

        Args:
            x: Input of the convolution, (batch, channels, *spatial).
            kernel_size: Pixels per spatial axis; an int serves every axis.
            stride: Pixels between windows.
            padding: Pixels on both sides, (left, right) pairs, "same" or "valid".
            dilation: Pixels between kernel elements.
            groups: Number of channel groups.
            simplify: Whether to simplify the network first; the result is the same.

        Raises:
            ValueError: If a hyper-parameter is impossible for `x`.
            TypeError: If a hyper-parameter is not made of integers.
        """
        network = self.network(x, kernel_size, stride, padding, dilation, groups)
        return einsum_expression(network, {"x": x}, simplify)

    def __call__(
        self,
        x: Tensor,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        """The value of the operation, along its cached plan."""
        network = self.network(x, kernel_size, stride, padding, dilation, groups)
        return execute(plan(network), {"x": x})
