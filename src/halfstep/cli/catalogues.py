"""``halfstep formats`` and ``halfstep recipes``: the catalogues, and what there is to say of one."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from halfstep.cli.printing import AsJson, print_record, print_records
from halfstep.format import Format, formats
from halfstep.recipe import Recipe, recipes

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
    as_json: AsJson = False,
) -> None:
    """The recipes that have a name, or one recipe in full.

    Example: halfstep recipes fp16:accumulate=fp16,master=fp16
    """
    if name:
        print_record(recipe_record(Recipe.parse(name)), as_json=as_json)
    else:
        records = [recipe_record(it) for it in recipes().values()]
        print_records(records, _RECIPE_COLUMNS, as_json)
        if not as_json:
            print()
            print_records(records, ("name", "summary"), as_json)


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
        "accumulate": it.accumulate.name,
        "master": it.master.name,
        "optimizer": it.optimizer.name,
        "scaling": it.loss_scaling.kind.value,
        "policy": it.policy.value,
        "guarded": it.guarded,
        "loss scaling": scaling,
        "summary": it.summary,
        "source": it.source,
    }
