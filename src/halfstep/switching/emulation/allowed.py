"""Which recipes can be emulated, and what is done in one."""

from __future__ import annotations

from halfstep.errors import SwitchError
from halfstep.recipe import SEEN_BY_PARTS, Recipe, Treatment, Update
from halfstep.recipe.exceptions import NOTHING_KEPT
from halfstep.switching.edits import check_edits, edited, is_composite
from halfstep.switching.explanation import Explanation
from halfstep.switching.plan import Executor, PlanRow

__all__ = ["check", "explain"]


def check(recipe: Recipe) -> None:
    """Raise `SwitchError` for what a recipe says about modules and products that have names.

    So for a policy's edit of an operation that is seen by its parts only; `RecipeError` for one of none.
    """
    check_edits(recipe.policy)
    for name in edited(recipe.policy):
        if name not in SEEN_BY_PARTS and is_composite(name):
            raise SwitchError(
                f"recipe {recipe}: emulate sees what {name} is made of, not {name} itself: edit the "
                "classes of its parts (of linear: addmm and mm; of conv2d: convolution), or use the switch"
            )
    if recipe.update is not Update.NEAREST or str(recipe.moments) != "fp32":
        raise SwitchError(
            f"recipe {recipe}: update={recipe.update.value}, moments={recipe.moments} need state between "
            "steps that emulate does not keep: use halfstep.switch, or update=nearest and moments=fp32"
        )
    if recipe.keep != NOTHING_KEPT:
        raise SwitchError(
            f"recipe {recipe} keeps some modules as they are ({recipe.keep}); emulate sees operations and no "
            f"modules: use halfstep.switch, or {recipe.name.partition(':')[0]}:keep=none"
        )
    if recipe.amax_history or recipe.hadamard:
        raise SwitchError(
            f"recipe {recipe} keeps histories or transforms operands layer by layer; emulate sees operations "
            "and no layers: use halfstep.switch"
        )


def explain(recipe: Recipe, *, native: bool) -> Explanation:
    """A table: what is done with each class of operations; ``native``: torch has the store format's dtype."""
    exempt = recipe.optimizer.name == "fp32"
    store = recipe.store.name
    wide = store if recipe.policy.store_all else "fp32"
    kernels = "torch's own kernels, " if native else ""
    operands = "/".join(
        dict.fromkeys(str(f) for f in (recipe.weight, recipe.activation, recipe.gradient))
    )
    writes = {
        Treatment.DOT: (operands, str(recipe.accumulate), store),
        Treatment.OWN: ("as given", "fp32", f"{store}, where all operands are"),
        Treatment.MOVE: ("as given", "", "as given"),
        Treatment.WIDE: ("as given", "fp32", wide),
        Treatment.NORM: (store, "fp32", store),
        Treatment.SUM: ("as given", "fp32", f"{store}, where all operands are"),
        Treatment.RANDOM: ("", "fp32", store if recipe.policy.store_all else "fp32"),
        Treatment.UNKNOWN: ("as given", "fp32", f"{store}, where all operands are"),
    }
    rows = [
        PlanRow(
            kind=kind.value,
            executor=Executor.OFF if recipe.is_identity else Executor.EMULATED,
            reads=reads,
            accumulates=adds,
            writes=written,
            why=(kernels if kind is Treatment.OWN else "") + kind.why,
        )
        for kind, (reads, adds, written) in writes.items()
    ]
    state = recipe.optimizer.name
    rows.append(
        PlanRow(
            kind="optimizer",
            executor=Executor.NATIVE if exempt else Executor.EMULATED,
            reads=recipe.master.name,
            accumulates=state,
            writes=recipe.master.name,
            why="runs as it is" if exempt else "rounded as every other operation",
        )
    )
    return Explanation(recipe=str(recipe), device="every device", rows=tuple(rows))
