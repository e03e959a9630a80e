"""``halfstep formats`` and ``halfstep recipes``: the catalogues, and what there is to say of one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from halfstep.cli.printing import AsJson, print_record, print_records
from halfstep.format import Format, formats
from halfstep.recipe import OpClass, OpPolicy, Recipe, recipes

__all__ = ["format_record", "list_formats", "list_recipes", "recipe_record"]

_FORMAT_COLUMNS = ("name", "bits", "exponent", "mantissa", "max", "smallest", "eps", "inf", "nan")
_RECIPE_COLUMNS = ("name", "operands", "store", "accumulate", "master", "optimizer")
_RECIPE_COLUMNS += ("scaling", "policy")


def list_formats(
    name: Annotated[str, typer.Argument(help="One format, in full.", show_default=False)] = "",
    as_json: AsJson = False,
) -> None:
    """The number formats that have a name, or one format in full.

    Families need no entry: eXmY, intN and qI.F can be asked for by name.

    Example: halfstep formats e6m9
    """
    if name:
        print_record(format_record(Format.parse(name)), as_json=as_json)
    else:
        print_records([format_record(it) for it in formats().values()], _FORMAT_COLUMNS, as_json)


def list_recipes(
    name: Annotated[
        str, typer.Argument(help="One recipe, or a variant, in full.", show_default=False)
    ] = "",
    policy: Annotated[
        str,
        typer.Option(
            help="Instead, an op policy, operation by operation: amp, paper, an edited one such as "
            "amp/softplus-own, or a JSON file as --json prints it.",
            show_default=False,
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """The recipes that have a name, one recipe in full, or an op policy.

    Example: halfstep recipes fp16:accumulate=fp16,master=fp16

    Example: halfstep recipes --policy amp
    """
    if policy and name:
        raise typer.BadParameter(
            f"give a recipe ({name}) or --policy {policy}, not both; "
            "the policy of a recipe is the last of its fields"
        )
    if policy:
        _print_policy(_read_policy(policy), as_json=as_json)
    elif name:
        print_record(recipe_record(Recipe.parse(name)), as_json=as_json)
    else:
        records = [recipe_record(it) for it in recipes().values()]
        print_records(records, _RECIPE_COLUMNS, as_json)
        if not as_json:
            print()
            print_records(records, ("name", "summary"), as_json)


def _read_policy(given: str) -> OpPolicy:
    path = Path(given)
    if path.suffix != ".json":
        return OpPolicy.parse(given)
    try:
        return OpPolicy.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise typer.BadParameter(f"--policy {given}: {error.strerror}") from None


def _print_policy(policy: OpPolicy, *, as_json: bool) -> None:
    if as_json:
        print(policy.to_json())
        return
    pairs = [*policy.classes, ("all others", OpClass.OWN)]
    rows = [{"operation": op, "class": kind.value, "why": kind.why} for op, kind in pairs]
    print_records(rows, ("operation", "class", "why"), as_json)
    print(f"\npolicy={policy}: {policy.summary or 'an edited policy'}")


def format_record(it: Format) -> dict[str, Any]:
    """What there is to say about a format, as plain values; NaN where a limit does not exist."""
    return {
        "name": it.name,
        "kind": it.kind.value,
        "bits": it.bits,
        "exponent": it.exponent_bits,
        "mantissa": it.mantissa_bits,
        "bias": it.bias,
        "max": it.max,
        "lowest": it.lowest,
        "smallest normal": it.smallest_normal,
        "smallest": it.smallest,
        "eps": it.eps,
        "inf": it.has_inf,
        "nan": it.has_nan,
        "overflow": it.overflow.value,
        "source": it.source,
    }


def recipe_record(it: Recipe) -> dict[str, Any]:
    """What there is to say about a recipe, as plain values."""
    operands = dict.fromkeys((it.weight.name, it.activation.name, it.gradient.name))
    scaling = dataclasses.asdict(it.loss_scaling) | {"kind": it.loss_scaling.kind.value}
    return {
        "name": it.name,
        "operands": "/".join(operands),
        "weight": it.weight.name,
        "activation": it.activation.name,
        "gradient": it.gradient.name,
        "store": it.store.name,
        "accumulate": str(it.accumulate),
        "master": it.master.name,
        "optimizer": it.optimizer.name,
        "update": it.update.value,
        "moments": str(it.moments),
        "scaling": it.loss_scaling.kind.value,
        "policy": str(it.policy),
        "guarded": it.guarded,
        "loss scaling": scaling,
        "summary": it.summary,
        "source": it.source,
    }
