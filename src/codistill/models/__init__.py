"""The papers' networks for small images, and networks of other libraries by name."""

from typing import TYPE_CHECKING

from codistill.utils.lazy import lazy_names

if TYPE_CHECKING:
    from codistill.models.external import EXTERNAL_MODELS as EXTERNAL_MODELS
    from codistill.models.external import LogitsOnly as LogitsOnly
    from codistill.models.external import Source as Source
    from codistill.models.external import accepted_kwargs as accepted_kwargs
    from codistill.models.external import import_callable as import_callable
    from codistill.models.external import parse_source as parse_source
    from codistill.models.external import pretrained_statistics as pretrained_statistics
    from codistill.models.external import takes_only_rgb as takes_only_rgb
    from codistill.models.registry import MODELS as MODELS
    from codistill.models.registry import WithWeights as WithWeights
    from codistill.models.registry import build as build
    from codistill.models.registry import has_weights as has_weights
    from codistill.models.registry import resolve as resolve
    from codistill.models.registry import source_of as source_of
    from codistill.models.weights import without_prefix as without_prefix
    from codistill.models.weights import without_wrappers as without_wrappers

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "external": (
            "EXTERNAL_MODELS LogitsOnly Source accepted_kwargs import_callable parse_source pretrained_statistics "
            "takes_only_rgb"
        ),
        "registry": "MODELS WithWeights build has_weights resolve source_of",
        "weights": "without_prefix without_wrappers",
    },
)
