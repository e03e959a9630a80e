"""`OpPolicy`: which operation rounds where, as one frozen table that can be printed, edited and compared."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from typing import Any

from halfstep.errors import RecipeError, UnknownNameError

__all__ = ["OpClass", "OpPolicy"]


class OpClass(Enum):
    """What an operation reads, computes in and writes; the members are the rule's classes."""

    DOT = "dot"
    DOTS = "dots"
    RECURRENT = "recurrent"
    WIDE = "fp32"
    MIXED = "mixed"
    INTO = "into"
    WIDEST = "widest"
    OWN = "own"

    @property
    def why(self) -> str:
        """What the class does, in one line."""
        return _WHY[self]

    def __lt__(self, other: OpClass) -> bool:
        return self.value < other.value


_WHY = {
    OpClass.DOT: "a dot product: operands rounded to their formats, one sum, one rounding at the end",
    OpClass.DOTS: "made of dot products: its operands are rounded, its parts follow the policy",
    OpClass.RECURRENT: "a recurrent layer: a chain of dot products over time",
    OpClass.WIDE: "range or many additions: computed in FP32, written in FP32",
    OpClass.MIXED: "a normalisation: the activation as it is, affine pair and statistics in FP32",
    OpClass.INTO: "writes into a tensor that is there: what is written takes its dtype",
    OpClass.WIDEST: "operands of several dtypes: the widest wins",
    OpClass.OWN: "computed in the dtype of its operands, FP32 inside",
}

# Only an operation that is one can be treated as one.
_BY_NATURE = (OpClass.DOT, OpClass.DOTS, OpClass.RECURRENT, OpClass.MIXED, OpClass.INTO)
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class OpPolicy:
    """Classes by operation; what is not named is `OpClass.OWN`.

    The text form is the name of a built-in policy, and what differs from it, in words
    ``operation-class`` joined by ``/``: ``amp/softplus-own``; ``OpPolicy.parse(str(p)) == p``.

    >>> policy = OpPolicy.parse("amp").with_class("softplus", "own")
    >>> str(policy), policy.class_of("exp").value, policy.class_of("relu").value
    ('amp/softplus-own', 'fp32', 'own')
    """

    base: str
    """The built-in policy that it is, or is a variant of."""
    classes: tuple[tuple[str, OpClass], ...]
    """(aten overload, class), sorted."""
    store_all: bool
    """True where FP32-class operations, too, write the store format."""
    summary: str = field(default="", compare=False)
    source: str = field(default="", compare=False)

    def class_of(self, op: str) -> OpClass:
        """The class of an aten overload such as ``"softmax.int"``, or of all overloads of ``"softmax"``."""
        table = _table(self.classes)
        if op in table or op in _known():
            return table.get(op, OpClass.OWN)
        found = {table.get(known, OpClass.OWN) for known in _overloads(op)}
        return found.pop() if len(found) == 1 else table.get(op.partition(".")[0], OpClass.OWN)

    def names(self, kind: OpClass) -> tuple[str, ...]:
        """The operations of a class, sorted."""
        return tuple(op for op, other in self.classes if other is kind)

    def with_class(self, op: str, kind: OpClass | str) -> OpPolicy:
        """A copy in which ``op`` is of that class; a name without overload stands for those in the table.

        Raises `UnknownNameError` for a class that is not known, `RecipeError` for a class that the
        operation cannot be of: only a dot product can be a dot product.
        """
        kind = _class(kind)
        table = dict(self.classes)
        for each in [op] if op in _known() else _overloads(op) or [op]:
            natural = _known().get(each, OpClass.OWN)
            if kind in _BY_NATURE and kind is not natural:
                raise RecipeError(
                    f"policy {self}: {each} cannot be of class {kind.value!r}; allowed: "
                    f"{', '.join(sorted({natural.value, 'fp32', 'widest', 'own'}))}"
                )
            table.pop(each, None)
            if kind is not OpClass.OWN:
                table[each] = kind
        return self.replace(classes=tuple(sorted(table.items())))

    def replace(self, **changes: Any) -> OpPolicy:
        """A copy with other values of the fields."""
        return dataclasses.replace(self, **changes)

    def differences(self, other: OpPolicy) -> dict[str, tuple[OpClass, OpClass]]:
        """Operations that the two put into different classes, with both classes."""
        mine, others = dict(self.classes), dict(other.classes)
        own = OpClass.OWN
        pairs = {op: (mine.get(op, own), others.get(op, own)) for op in sorted({*mine, *others})}
        return {op: pair for op, pair in pairs.items() if pair[0] is not pair[1]}

    @classmethod
    def parse(cls, given: object) -> OpPolicy:
        """The policy that a text means; an `OpPolicy` is returned as it is.

        Raises `UnknownNameError` or `RecipeError` for a word that is not known.
        """
        if isinstance(given, cls):
            return given
        name, *words = str(given).strip().split("/")
        policy = _built_in(name)
        for word in words:
            op, dash, kind = word.partition("-")
            if not (op and dash and kind):
                raise RecipeError(
                    f"policy {given!r}: {word!r} should be operation-class, as in amp/softplus-own"
                )
            op, before = _spelled(policy, op), policy
            policy = policy.with_class(op, kind)
            near = difflib.get_close_matches(op, _known(), n=1, cutoff=0.85)
            if policy == before and op not in _known() and not _overloads(op) and near:
                raise RecipeError(f"policy {given!r}: no operation {op!r}; did you mean {near[0]}?")
        return policy

    def __str__(self) -> str:
        changed = _built_in(self.base).differences(self)
        return "/".join([self.base, *(f"{op}-{kind.value}" for op, (_, kind) in changed.items())])

    def to_json(self) -> str:
        """The whole table as JSON text, which `from_json` reads."""
        table: dict[str, list[str]] = {}
        for op, kind in self.classes:
            table.setdefault(kind.value, []).append(op)
        record = {"version": _VERSION, "base": self.base, "classes": table}
        return json.dumps(record, indent=2)

    @classmethod
    def from_json(cls, text: str) -> OpPolicy:
        """The policy of a JSON text as `to_json` writes it, edited or not; what is left out is "own".

        Raises `RecipeError` for a text that is no such table, `UnknownNameError` for a class that
        is not known.
        """
        try:
            record = json.loads(text)
            version, base, table = record["version"], record["base"], record["classes"]
            pairs = [(str(op), kind) for kind, ops in table.items() for op in ops]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RecipeError(
                f"not the JSON of an op policy ({error!r}); print one with "
                "`halfstep recipes --policy amp --json`"
            ) from None
        if version != _VERSION:
            raise RecipeError(f"op policy of version {version!r}; this halfstep reads {_VERSION}")
        policy = _built_in(base).replace(classes=())
        twice = {op for op, _ in pairs if sum(op == other for other, _ in pairs) > 1}
        if twice:
            raise RecipeError(f"op policy: {', '.join(sorted(twice))} in more than one class")
        for op, kind in pairs:
            policy = policy.with_class(op, kind)
        return policy


def _spelled(policy: OpPolicy, op: str) -> str:
    """The name as the table spells it: the text of a recipe is in small letters."""
    known = (*_known(), *(name for name, _ in policy.classes))
    return next((name for name in known if name.lower() == op.lower()), op)


@cache
def _known() -> dict[str, OpClass]:
    """The classes by nature."""
    # The built-in policies are made of the class above: import at the call.
    from halfstep.recipe.policies import AMP

    return dict(AMP.classes)


@cache
def _overloads(op: str) -> list[str]:
    """The known operations of which ``op`` is the name without overload."""
    return [known for known in _known() if known.partition(".")[0] == op]


@cache
def _table(classes: tuple[tuple[str, OpClass], ...]) -> dict[str, OpClass]:
    return dict(classes)


def _class(given: object) -> OpClass:
    try:
        return OpClass(given)
    except ValueError:
        raise UnknownNameError("class of operations", given, [k.value for k in OpClass]) from None


def _built_in(name: object) -> OpPolicy:
    # The built-in policies are made of this class: import at the call.
    from halfstep.recipe.policies import policies

    if not isinstance(name, str) or name not in policies():
        raise UnknownNameError("op policy", name, policies())
    return policies()[name]
