"""From a function of shapes to an operation on tensors.

An operation is written once, as a function that derives a network from shapes. Around
it, `operation` builds what users call: the value, the einsum expression, the network.
All symbolic work is cached by shapes and hyper-parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, update_wrapper
from inspect import signature
from typing import Any, Generic, NamedTuple, ParamSpec

from torch import Tensor

from tn_kfac.tensor_network.convolution import require_int
from tn_kfac.tensor_network.execute import einsum_expression, execute
from tn_kfac.tensor_network.network import Network
from tn_kfac.tensor_network.slicing import DEFAULT_LIMIT, AnyPlan, plan

P = ParamSpec("P")
Reader = Callable[[str, Any, dict[str, Tensor]], Any]
"""Makes a hashable stand-in of a named argument; tensors are collected."""


@dataclass(frozen=True)
class Expression:
    """A derived network, whether to simplify it, and how large intermediates may be."""

    network: Network
    simplify: bool = True
    memory_limit: int = DEFAULT_LIMIT

    @cached_property
    def _plans(self) -> dict[bool, AnyPlan]:
        """Plans made so far: a look-up here need not hash the network."""
        return {}

    def plan(self, lowered: bool = True) -> AnyPlan:
        """How the network is contracted; `memory_limit` as in `Operation.limited`."""
        if lowered not in self._plans:
            self._plans[lowered] = plan(self.network, self.simplify, lowered, self.memory_limit)
        return self._plans[lowered]


class Shaped(NamedTuple):
    """What stands for a tensor while a network is derived: its shape."""

    shape: tuple[int, ...]


class Operation(Generic[P]):
    """An operation on tensors; call it for its value.

    Arguments are those of the function that it was made from, tensors first.
    """

    def __init__(self, derive: Callable[P, Expression], memory_limit: int = DEFAULT_LIMIT) -> None:
        update_wrapper(self, derive)
        self._function = derive
        self._memory_limit = memory_limit
        self._derive = lru_cache(maxsize=1024)(self._limited(derive))
        parameters = signature(derive).parameters
        self._names = tuple(parameters)
        self._readers: dict[str, Reader] = {
            name: _shape if parameter.annotation == "Tensor" else _flag
            for name, parameter in parameters.items()
            if parameter.annotation == "Tensor" or name == "simplify"
        }

    def __repr__(self) -> str:
        return f"<operation {self.__name__}>"  # type: ignore[attr-defined]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        """The value of the operation, contracted along its cached plan.

        Raises:
            ValueError: If a hyper-parameter is impossible, or dtypes or devices differ.
            TypeError: If an argument has the wrong type.
        """
        expression, tensors = self.bound(args, kwargs)
        kernels = next(iter(tensors.values())).dtype.is_floating_point
        return execute(expression.plan(kernels), tensors)

    def _limited(self, derive: Callable[P, Expression]) -> Callable[P, Expression]:
        """The function with this operation's memory limit in its expressions."""
        return lambda *args, **kwargs: replace(
            derive(*args, **kwargs), memory_limit=self._memory_limit
        )

    def limited(self, memory_limit: int) -> Operation[P]:
        """The operation with intermediates of about `memory_limit` elements at most.

        The contraction is sliced along axes that no pattern touches (batch, groups,
        channels); the result is the same. One slice is the least that is held, and never
        less than the result.

        Raises:
            TypeError: If the limit is no integer.
            ValueError: If the limit is not positive.
        """
        require_int("memory_limit", memory_limit, 1)
        return Operation(self._function, memory_limit)

    def einsum_expression(
        self, *args: P.args, **kwargs: P.kwargs
    ) -> tuple[str, list[Tensor], tuple[int, ...]]:
        """(equation, operands, shape): `torch.einsum(equation, *operands).reshape(shape)`.

        Raises:
            ValueError: As the call does, and if the equation needs more than 52 letters.
            TypeError: If an argument has the wrong type.
        """
        expression, tensors = self.bound(args, kwargs)
        return einsum_expression(expression.network, tensors, expression.simplify)

    def expression(self, *args: P.args, **kwargs: P.kwargs) -> Expression:
        """The derived network."""
        return self.bound(args, kwargs)[0]

    def bound(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Expression, dict[str, Tensor]]:
        """The cached expression of a call, and its tensors by name."""
        tensors: dict[str, Tensor] = {}
        readers = self._readers
        positional = [
            readers.get(name, _hyper)(name, value, tensors)
            for name, value in zip(self._names, args, strict=False)
        ]
        positional += args[len(self._names) :]  # too many: the function itself complains
        named = {  # a name that is none the function itself refuses
            n: readers.get(n, _hyper)(n, value, tensors) if n in self._names else None
            for n, value in kwargs.items()
        }
        if len(tensors) > 1:
            _check_alike(tensors)
        expression = self._derive(*positional, **named)
        _check_scale(expression.network, tensors)
        return expression, tensors


def operation(derive: Callable[P, Expression]) -> Operation[P]:
    """Make an operation of a function from shapes to an expression.

    Parameters annotated `Tensor` name the operands of the network; while the function
    runs, they have a `shape` and nothing else.
    """
    return Operation(derive)


def _shape(name: str, value: Any, tensors: dict[str, Tensor]) -> Shaped:
    """What stands for a tensor, which is collected."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    tensors[name] = value
    return Shaped(tuple(value.shape))


def _flag(name: str, value: Any, tensors: dict[str, Tensor]) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"argument {name} must be True or False, got {value!r}")
    return value


def _hyper(name: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    return value if type(value) is int else _hashable(name, value)


def _hashable(name: str, value: Any) -> Any:
    """Integers and strings, in tuples.

    Anything else is refused before the cache can take 3.0 or True for an integer.
    """
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(name, entry) for entry in value)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"{name} must be made of integers, got {value!r}")
    return value


def _check_alike(tensors: Mapping[str, Tensor]) -> None:
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors.values()}
    if len(kinds) > 1:
        shown = ", ".join(f"{name} is {t.dtype} on {t.device}" for name, t in tensors.items())
        raise ValueError(f"tensors must share dtype and device, but {shown}: convert with .to()")


def _check_scale(network: Network, tensors: Mapping[str, Tensor]) -> None:
    """A mean of integers is no integer."""
    for name, tensor in tensors.items():
        whole = not (tensor.is_floating_point() or tensor.is_complex())
        if whole and network.scale != 1:
            raise TypeError(
                f"{name} is {tensor.dtype}, but the result is a mean: convert it with .float()"
            )
