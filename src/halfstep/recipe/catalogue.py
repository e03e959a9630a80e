"""Every recipe that has a name, by name, and the names that other libraries have for them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from halfstep.recipe.narrow_operands import NARROW_OPERANDS
from halfstep.recipe.recipe import Recipe
from halfstep.recipe.sixteen_bits import SIXTEEN_BITS

__all__ = ["CATALOGUE", "SYNONYMS", "recipes"]

CATALOGUE: Mapping[str, Recipe] = MappingProxyType(
    {recipe.name: recipe for recipe in (*SIXTEEN_BITS, *NARROW_OPERANDS)}
)

# What users of other libraries already write -> the name here.
SYNONYMS: Mapping[str, str] = MappingProxyType(
    {
        # Accelerate
        "no": "fp32",
        # torch dtypes and their spellings in other libraries
        "float32": "fp32",
        "float": "fp32",
        "float16": "fp16",
        "half": "fp16",
        "bfloat16": "bf16",
        # Lightning
        "32-true": "fp32",
        "16-mixed": "fp16",
        "16-true": "fp16-naive",
        "bf16-mixed": "bf16",
        "bf16-true": "bf16-pure",
        # Keras
        "mixed_float16": "fp16",
        "mixed_bfloat16": "bf16",
        # Composer
        "amp_fp16": "fp16",
        "amp_bf16": "bf16",
    }
)


def recipes() -> Mapping[str, Recipe]:
    """Every recipe of the catalogue, by name, FP32 first; variants are made by `Recipe.parse`.

    >>> [name for name, recipe in recipes().items() if recipe.inference_only]
    ['int8-inference', 'int4-inference', 'binary-inference']
    """
    return CATALOGUE
