"""Every setting, on the standard library alone."""

from typing import TYPE_CHECKING

from codistill.utils.lazy import lazy_names

if TYPE_CHECKING:
    from codistill.config.checks import images_per_class as images_per_class
    from codistill.config.checks import mesh_shape as mesh_shape
    from codistill.config.checks import parse_normalize as parse_normalize
    from codistill.config.config import Checkpoint as Checkpoint
    from codistill.config.config import CompareConfig as CompareConfig
    from codistill.config.config import Config as Config
    from codistill.config.config import Device as Device
    from codistill.config.config import ReproduceConfig as ReproduceConfig
    from codistill.config.config import slug as slug
    from codistill.config.contrib import CodistillationConfig as CodistillationConfig
    from codistill.config.contrib import CosubConfig as CosubConfig
    from codistill.config.contrib import DLBConfig as DLBConfig
    from codistill.config.contrib import FFSDConfig as FFSDConfig
    from codistill.config.contrib import HSSAKDConfig as HSSAKDConfig
    from codistill.config.contrib import LMCLConfig as LMCLConfig
    from codistill.config.contrib import MCLConfig as MCLConfig
    from codistill.config.contrib import OKDPHConfig as OKDPHConfig
    from codistill.config.contrib import SwitOKDConfig as SwitOKDConfig
    from codistill.config.method_base import DivergenceConfig as DivergenceConfig
    from codistill.config.method_base import MethodConfig as MethodConfig
    from codistill.config.method_base import TeacherConfig as TeacherConfig
    from codistill.config.methods import METHODS as METHODS
    from codistill.config.methods import CLILRConfig as CLILRConfig
    from codistill.config.methods import DMLConfig as DMLConfig
    from codistill.config.methods import IndependentConfig as IndependentConfig
    from codistill.config.methods import KDCLConfig as KDCLConfig
    from codistill.config.methods import KDConfig as KDConfig
    from codistill.config.methods import OKDDipConfig as OKDDipConfig
    from codistill.config.methods import ONEConfig as ONEConfig
    from codistill.config.methods import PCLConfig as PCLConfig
    from codistill.config.methods import UnimportedConfig as UnimportedConfig
    from codistill.config.methods import method_config as method_config
    from codistill.config.old_names import rename_old_flags as rename_old_flags
    from codistill.config.ranges import ABOVE_0 as ABOVE_0
    from codistill.config.ranges import AT_LEAST_0 as AT_LEAST_0
    from codistill.config.ranges import FROM_0_TO_1 as FROM_0_TO_1
    from codistill.config.recipe import RECIPE_OPTIONS as RECIPE_OPTIONS
    from codistill.config.recipe import choose_recipe as choose_recipe
    from codistill.config.schedule import learning_rate_at as learning_rate_at

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "checks": "images_per_class mesh_shape parse_normalize",
        "config": "Checkpoint CompareConfig Config Device ReproduceConfig slug",
        "schedule": "learning_rate_at",
        "contrib": (
            "CodistillationConfig CosubConfig DLBConfig FFSDConfig HSSAKDConfig LMCLConfig MCLConfig OKDPHConfig "
            "SwitOKDConfig"
        ),
        "method_base": "DivergenceConfig MethodConfig TeacherConfig",
        "methods": (
            "CLILRConfig DMLConfig IndependentConfig KDCLConfig KDConfig METHODS OKDDipConfig ONEConfig PCLConfig "
            "UnimportedConfig method_config"
        ),
        "old_names": "rename_old_flags",
        "ranges": "ABOVE_0 AT_LEAST_0 FROM_0_TO_1",
        "recipe": "RECIPE_OPTIONS choose_recipe",
    },
)
