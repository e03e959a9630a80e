"""Where which number is used: recipes as frozen data, their catalogue and their text form."""

from halfstep.recipe.catalogue import recipes
from halfstep.recipe.loss_scaling import LossScaling, ScalingKind
from halfstep.recipe.recipe import Policy, Recipe

__all__ = ["LossScaling", "Policy", "Recipe", "ScalingKind", "recipes"]
