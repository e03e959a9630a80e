"""Where which number is used: recipes as frozen data, op policies, their catalogues and text forms."""

from halfstep.recipe.below_autograd import (
    SEEN_BY_PARTS,
    WIDE_OUTPUTS,
    Traits,
    Treatment,
    is_wide_node,
    treatment,
)
from halfstep.recipe.catalogue import recipes
from halfstep.recipe.exceptions import Keep
from halfstep.recipe.loss_scaling import LossScaling, ScalingKind
from halfstep.recipe.op_policy import OpClass, OpPolicy
from halfstep.recipe.policies import policies
from halfstep.recipe.recipe import Recipe, Update

__all__ = [
    "SEEN_BY_PARTS",
    "WIDE_OUTPUTS",
    "Keep",
    "LossScaling",
    "OpClass",
    "OpPolicy",
    "Recipe",
    "ScalingKind",
    "Traits",
    "Treatment",
    "Update",
    "is_wide_node",
    "policies",
    "recipes",
    "treatment",
]
