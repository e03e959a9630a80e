"""How an op becomes one node of a graph: `torch.compile`, `torch.export`, and dispatch modes.

A kernel that is handed an address cannot be traced. So every public op has two ways in, and they
end in the same private function::

    def round_to(x, format, ...):                       # the public op
        if is_traced():                                 # 1. a graph is being made: one node
            return _node(x, format_text(format), ...)
        ...checks...                                    # 2. eager: straight to the back end
        return _rounded(x, Format.parse(format), ...)

    def _eager(x, format, ...):                         # what the node does when it runs
        return _rounded(x, Format.parse(format), ...)

    _node = operator("round_to", "(Tensor x, str format, ...) -> Tensor", _eager,
                     fake=_fake, backward=straight_through, batched=_batched)

The rules:

- A node takes tensors and plain values: `str`, `int`, `float`, `bool`, lists of them. A format goes
  as `format_text(format)`, an enum as its value, other frozen values as their text (`text_of`); all
  are parsed again when the node runs. What makes a text of a caller's arguments is `constant`:
  torch.compile runs it while it makes the graph, on real values, and looks not into it.
- ``fake`` makes the result's shape and dtype from those of the arguments, and makes the same checks
  as the eager way, so that a wrong argument is an error when the graph is made.
- ``_eager`` calls no public op: under a dispatch mode that would be a node again, without end.
- Results are new tensors; what is written is named in ``mutates``.
- Random bits: the key comes from `seed_for`, one number drawn from torch's default CPU generator by
  a node of its own. A compiled function draws in the order of the eager one, so the same
  `torch.manual_seed` gives the same numbers in both.
- Eager calls do not go through the node: the dispatcher and its Python kernels cost about 20 us.

``backward(ctx, *gradients)`` is as in `torch.library.register_autograd` (``setup`` saves for it),
``batched`` as in `torch.library.register_vmap`. Forward-mode derivatives, and `torch.func.grad`
inside of a compiled function, are torch's error for an op made by `torch.library`; eager has both.

Source: PyTorch, `torch.library`, Custom Python operators.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from enum import Enum
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from halfstep.errors import HalfstepError, OperandError
from halfstep.format import BlockFormat, Format
from halfstep.ops.random_bits import check_generator

__all__ = [
    "block_format_text",
    "choice_text",
    "constant",
    "format_of",
    "format_text",
    "is_traced",
    "operator",
    "outside_graphs",
    "seed_for",
    "straight_through",
    "text_of",
    "value_of",
]

F_ = TypeVar("F_", bound=Callable[..., Any])
T_ = TypeVar("T_")

# Values that no text means, by what stands for them in the graphs of this process.
_OWN: dict[str, object] = {}
_NO_NODE = "it is no node of graphs; leave fullgraph=True away"


def is_traced() -> bool:
    """True where a call should be one node: in a graph being made, or under a dispatch mode."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def operator(
    name: str,
    schema: str,
    function: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup: Callable[..., None] | None = None,
    batched: Callable[..., Any] | None = None,
    mutates: Sequence[str] = (),
    random: bool = False,
) -> Callable[..., Any]:
    """The op ``torch.ops.halfstep.<name>``, for all devices; see the top of this module.

    ``random``: it draws from a generator, so that no two calls are one.
    """
    tags = (torch.Tag.nondeterministic_seeded,) if random else ()
    op = torch.library.custom_op(
        f"halfstep::{name}", function, mutates_args=mutates, schema=schema, tags=tags
    )
    op.register_fake(fake)
    if backward is not None:
        op.register_autograd(backward, setup_context=setup)
    if batched is not None:
        op.register_vmap(batched)
    return op


def straight_through(arguments: int) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward of an op of so many arguments that hands its gradient to the first one."""

    def backward(_: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (gradient, *[None] * (arguments - 1))

    return backward


def constant(function: F_) -> F_:
    """``function`` of plain values, whose result is a constant of the graphs in which it is called.

    As `torch.compiler.assume_constant_result`, which takes torch's compiler in: over a second.
    """
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def outside_graphs(function: F_, *, reason: str = _NO_NODE) -> F_:
    """``function``, run eagerly where `torch.compile` meets it: the graph ends before and goes on after.

    For what is no node: its result is no tensor, or traced, the addresses of tensors would become
    constants. As `torch.compiler.disable`, without taking torch's compiler in before it is needed.
    """

    @cache
    def disabled() -> Callable[..., Any]:
        return torch.compiler.disable(function, reason=reason)

    @wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        run = disabled() if "torch._dynamo" in sys.modules else function
        return run(*args, **kwargs)

    # what the compiler looks for
    outside._torchdynamo_disable = True  # pyright: ignore[reportAttributeAccessIssue]
    outside._torchdynamo_disable_msg = reason  # pyright: ignore[reportAttributeAccessIssue]
    return outside  # pyright: ignore[reportReturnType]


def choice_text(choice: object) -> str:
    """What stands for an enum's member, or for a name of one, in a graph."""
    return choice.value if isinstance(choice, Enum) else str(choice)


def format_text(format: object) -> str:
    """What stands for a format in a graph; `format_of` is its inverse."""
    return format if isinstance(format, str) else _format_text(format)


@constant
def _format_text(format: object) -> str:
    parsed = Format.parse(format)
    return text_of(parsed, parsed.name, Format.parse)


def format_of(text: str) -> Format:
    """The format that `format_text` made this text of. Raises as `value_of`."""
    return value_of(text, Format.parse)


def block_format_text(format: object) -> str:
    """What stands for a block format in a graph; `value_of` with its parser is the inverse."""
    return format if isinstance(format, str) else _block_format_text(format)


@constant
def _block_format_text(format: object) -> str:
    parsed = BlockFormat.parse(format)
    return text_of(parsed, parsed.name, BlockFormat.parse)


def text_of(value: object, text: str, parse: Callable[[str], object]) -> str:
    """What stands for a frozen value in a graph: ``text`` if that is parsed to it, else one of its own."""
    try:
        if parse(text) == value:
            return text
    except HalfstepError:
        pass
    own = next((own for own, known in _OWN.items() if known == value), "")
    if not own:
        own = f"{text}#{len(_OWN)}"
        _OWN[own] = value
    return own


def value_of(text: str, parse: Callable[[str], T_]) -> T_:
    """The value that `text_of` made this text of.

    Raises `OperandError` for one of another process that has no text.
    """
    if text in _OWN:
        return _OWN[text]  # pyright: ignore[reportReturnType]
    if "#" in text:
        raise OperandError(
            f"{text.rpartition('#')[0]!r} was given as an object to the process that made this graph "
            "and has a format without a name; graphs for other processes need formats that have one"
        )
    return parse(text)


def _draw_seed(call: int, *, device: torch.device) -> Tensor:
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


_seed = operator(
    "draw_seed",
    "(int call, *, Device device) -> Tensor",  # where its generator is: torch's checkpoints ask
    _draw_seed,
    fake=lambda call, *, device: torch.empty((), dtype=torch.int64, device=device),
    random=True,
)
_calls = itertools.count()


@constant
def _next_call() -> int:
    # torch's elimination of common subexpressions knows its own random ops by name, and no tag:
    # two draws of one graph must differ in an argument.
    return next(_calls)


def seed_for(generator: torch.Generator | None) -> Tensor:
    """One number of the generator, as `halfstep.ops.random_bits.draw_key` draws it, in a graph."""
    if generator is not None:
        return _seed_of(generator)
    return _seed(_next_call(), device=torch.device("cpu"))


def _draw_seed_of(generator: torch.Generator) -> Tensor:
    check_generator(generator)
    return torch.randint(
        2**63 - 1, (), dtype=torch.int64, device=generator.device, generator=generator
    )


_seed_of = outside_graphs(
    _draw_seed_of,
    reason="torch.compile takes no torch.Generator; leave generator= away and seed torch's own "
    "with torch.manual_seed",
)
