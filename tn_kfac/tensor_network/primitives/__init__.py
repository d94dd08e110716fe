"""How primitives are computed: torch's convolutions and matrix products, or our kernels."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tn_kfac.tensor_network.lower import (
    Autocorrelation,
    ConvolutionCall,
    Primitive,
    SquareSum,
    WindowSum,
)
from tn_kfac.tensor_network.primitives.arrange import Materialise, Sizes
from tn_kfac.tensor_network.primitives.autocorrelation import autocorrelate
from tn_kfac.tensor_network.primitives.convolution import convolve
from tn_kfac.tensor_network.primitives.sums import sum_squares, sum_windows

__all__ = ["PRIMITIVES", "Materialise", "Sizes"]

PRIMITIVES: dict[type[Primitive], Callable[..., Tensor]] = {
    ConvolutionCall: convolve,
    WindowSum: sum_windows,
    SquareSum: sum_squares,
    Autocorrelation: autocorrelate,
}
