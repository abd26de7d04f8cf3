"""Recipes: short functions that return the config of a published table, or of the demo."""

from codistill.recipes import kdcl, okddip, pcl
from codistill.recipes.tables import TableRecipe

TABLES: dict[str, TableRecipe] = okddip.TABLES | pcl.TABLES | kdcl.TABLES
"""Every published table that can be trained anew, by name."""
