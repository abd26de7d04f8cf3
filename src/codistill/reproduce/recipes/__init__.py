"""Recipes: functions that return the configs of the published tables and of the demo."""

from codistill.reproduce.recipes import contrib, kdcl, okddip, pcl
from codistill.reproduce.recipes.table_recipe import TableRecipe

TABLES: dict[str, TableRecipe] = okddip.TABLES | pcl.TABLES | kdcl.TABLES | contrib.TABLES
"""Every published table that can be reproduced, by name."""
