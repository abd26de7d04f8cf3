"""Networks of other libraries and of the user: `timm:NAME`, `torchvision:NAME`, `hf:PATH`, `package.module:callable`.

Options follow the name after commas, as Python values: `torchvision:mobilenet_v2,width_mult=0.5`. The libraries are
imported when a name needs them. A `Source` is a callable that builds one network for a number of classes, channels and
pixels; pretrained weights are loaded into all layers but the classifier head.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from codistill.models.weights import load_weights
from codistill.utils import InputError, current_network_name, first_line, import_object

KINDS = {
    "timm": "timm:NAME[,OPTION=VALUE ...]",
    "torchvision": "torchvision:NAME[,OPTION=VALUE ...]",
    "hf": "hf:PATH (a transformers image classifier)",
}
EXTERNAL_MODELS = {
    "timm:NAME": "any classifier of timm (pip install timm)",
    "torchvision:NAME": "any classifier of torchvision; takes 3 channels",
    "hf:PATH": "an image classifier of transformers (pip install transformers)",
    "package.module:callable": "your own code; called with num_classes, in_channels, image_size, if it takes them",
}
# Auxiliary classifiers would make these return tuples while they train.
_TORCHVISION_DEFAULTS = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


@dataclass
class Source:
    """Builds the network of another library or of the user that a name stands for."""

    name: str
    """The whole name, as given by the user."""
    kind: str
    path: str
    """The part between the kind and the options."""
    options: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False

    @property
    def is_library(self) -> bool:
        """Whether a library made the network, and not the user."""
        return self.kind in KINDS

    @property
    def native_size(self) -> int | None:
        """Side of the images that the network was made for; None where it is built for the size of the images."""
        if self.kind == "torchvision":
            return None if self.path.startswith("vit_") else 299 if self.path == "inception_v3" else 224
        if self.kind == "timm" and not self.path.startswith("local-dir:"):
            model_cfg = _import_library(self, "timm").get_pretrained_cfg(self.path)
            return None if model_cfg is None or model_cfg.fixed_input_size else model_cfg.input_size[-1]
        return None

    def library_options(self, image_size: int | None) -> dict[str, Any]:
        """Return the options with which timm or torchvision builds the network for images of this size."""
        options = self.options
        if self.kind == "timm" and not self.path.startswith("local-dir:"):
            model_cfg = _import_library(self, "timm").get_pretrained_cfg(self.path)
            if (
                model_cfg is not None
                and model_cfg.fixed_input_size
                and image_size not in (None, model_cfg.input_size[-1])
            ):
                options = {"img_size": image_size} | options
        if self.kind == "torchvision":
            options = _TORCHVISION_DEFAULTS.get(self.path, {}) | options
            if self.path.startswith("vit_") and image_size is not None:
                options = {"image_size": image_size} | options
        return options

    def __call__(self, num_classes: int = 1000, in_channels: int = 3, image_size: int | None = None) -> nn.Module:
        """Build one network.

        Raises:
            InputError: the library is missing, or has no such network, option or weights.
        """
        builders = {"timm": _build_timm, "torchvision": _build_torchvision, "hf": _build_hf}
        return builders.get(self.kind, _build_imported)(self, num_classes, in_channels, image_size)


def parse_source(name: str, *, pretrained: bool = False) -> Source | None:
    """Return the source that a name stands for; None for a built-in name, which has no colon."""
    name = current_network_name(name)
    kind, colon, rest = name.partition(":")
    if not colon:
        return None
    # Commas inside brackets belong to a value: timm:swin_tiny_patch4_window7_224,depths=(1,1,1,1)
    path, *pairs = re.split(r",(?![^()\[\]]*[)\]])", rest)
    if not path or not kind:
        raise InputError(f'--model "{name}" lacks a name; give {", ".join(KINDS.values())} or package.module:callable')
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f'--model {name}: "{pair}" is not an option; write OPTION=VALUE after a comma')
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return Source(name, kind, path, options, pretrained)


def takes_only_rgb(name: str, *, pretrained: bool) -> bool:
    """Return whether a network takes only 3 channels, so that gray images are repeated."""
    kind = name.partition(":")[0] if ":" in name else ""
    return kind == "torchvision" or (kind == "hf" and pretrained)


def pretrained_statistics(names: Iterable[str]) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]] | None]:
    """Return, for each network, mean and deviation by which its pretrained weights normalize; None: unknown."""
    found: dict[str, tuple[tuple[float, ...], tuple[float, ...]] | None] = {}
    for name in names:
        source = parse_source(name, pretrained=True)
        preprocessing: Any = None
        if source is not None and source.kind == "timm" and not source.path.startswith("local-dir:"):
            preprocessing = _import_library(source, "timm").get_pretrained_cfg(source.path)
        elif source is not None and source.kind == "torchvision":
            from torchvision import models

            known = source.path in models.list_models(module=models)
            if known:
                preprocessing = models.get_model_weights(source.path).DEFAULT.transforms()  # pyrefly: ignore
        elif source is not None and source.kind == "hf":
            preprocessing = _hf_preprocessing(source)
        found[name] = None if preprocessing is None else (tuple(preprocessing.mean), tuple(preprocessing.std))
    return found


def _suggest_name(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, [*known], n=1, cutoff=0.6)
    return f' (did you mean "{near[0]}"?)' if near else ""


@contextmanager
def errors_as_sentences(source: Source) -> Iterator[None]:
    """Raise any error within the context as an `InputError` of one sentence."""
    try:
        yield
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"--model {source.name}: {first_line(error)}") from error
    except Exception as error:  # constructors and downloads may raise anything
        reason = first_line(error).rstrip(".")
        if "weights_only" in reason:  # torch's and timm's own messages suggest to load them without the check
            reason = "the file asks for more than tensors and plain values"
        if source.pretrained:
            raise InputError(
                f"--pretrained: the weights of {source.name} are not on this machine and cannot be downloaded, or do "
                f"not fit ({reason}); leave --pretrained out, or name a file with --weights"
            ) from error
        raise InputError(f"--model {source.name} cannot be built ({reason}); fix its name or options") from error


def _import_library(source: Source, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        extra = {"hf": "transformers"}.get(source.kind, source.kind)
        raise InputError(f"--model {source.name} needs: pip install {extra}") from None


def _build_timm(source: Source, num_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    timm = _import_library(source, "timm")
    local = source.path.startswith("local-dir:")
    if not local and not timm.is_model(source.path.partition(".")[0]):
        raise InputError(
            f'--model {source.name}: timm has no "{source.path}"{_suggest_name(source.path, timm.list_models())}'
        )
    options = source.library_options(image_size)
    with errors_as_sentences(source):
        return timm.create_model(
            source.path, pretrained=source.pretrained, num_classes=num_classes, in_chans=in_channels, **options
        )


def _build_torchvision(source: Source, num_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if source.path not in known:
        raise InputError(
            f'--model {source.name}: torchvision has no "{source.path}"{_suggest_name(source.path, known)}'
        )
    if in_channels != 3:
        raise InputError(f"--model {source.name} takes 3 channels, not {in_channels}; leave --channels out or give 3")
    options = source.library_options(image_size)
    with errors_as_sentences(source):
        network = models.get_model(source.path, weights=None, num_classes=num_classes, **options)
        if not source.pretrained:
            return network
        weights = models.get_model_weights(source.path).DEFAULT.get_state_dict(progress=False, check_hash=True)  # pyrefly: ignore
        return load_weights(network, dict(weights), f"--pretrained {source.path}")


class LogitsOnly(nn.Module):
    """A transformers classifier that returns its logits as a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the logits, `B x C`."""
        return self.model(pixel_values=x_BCHW).logits


def _build_hf(source: Source, num_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    transformers = _import_library(source, "transformers")
    with errors_as_sentences(source):
        # Without this option transformers asks whether to run the folder's code.
        options = {"trust_remote_code": False} | source.options
        model_cfg = transformers.AutoConfig.from_pretrained(source.path, **options)
        trust = {"trust_remote_code": bool(options["trust_remote_code"])}
        _check_implementations(source, model_cfg)
        model_cfg.num_labels = num_classes
        classifier = transformers.AutoModelForImageClassification
        if source.pretrained:
            if in_channels != 3:
                raise InputError(f"--pretrained {source.name} takes 3 channels; leave --channels out or give 3")
            with _quiet(transformers):
                loaded = classifier.from_pretrained(
                    source.path, config=model_cfg, ignore_mismatched_sizes=True, **trust
                )
            return LogitsOnly(loaded)
        if hasattr(model_cfg, "num_channels"):
            model_cfg.num_channels = in_channels
        if hasattr(model_cfg, "image_size") and image_size is not None:
            model_cfg.image_size = image_size
        return LogitsOnly(classifier.from_config(model_cfg, **trust))


def _check_implementations(source: Source, model_cfg: Any) -> None:
    """Refuse a folder that names kernels of the Hub (owner/name), which are programs; the options may name some.

    Raises:
        InputError: it does.
    """
    for kind in ("attn_implementation", "experts_implementation"):
        found = getattr(model_cfg, f"_{kind}", None)
        named = [str(value) for value in (found.values() if isinstance(found, dict) else [found]) if "/" in str(value)]
        if named and kind not in source.options:
            raise InputError(
                f"--model {source.name} names code to run, {named[0]}; take {kind} out of its config.json, "
                f"or, if you trust it, name it: --model {source.name},{kind}={named[0]}"
            )


def _hf_preprocessing(source: Source) -> Any:
    """Return mean and deviation of the images from the folder or the Hub; None where there are none."""
    transformers = _import_library(source, "transformers")
    try:
        found, _ = transformers.image_processing_utils.ImageProcessingMixin.get_image_processor_dict(source.path)
    except OSError:  # there is no such file, or no network
        return None
    if "image_mean" not in found or "image_std" not in found:
        return None
    return SimpleNamespace(mean=found["image_mean"], std=found["image_std"])


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep transformers from warning about the new head, which is intended."""
    log = transformers.utils.logging
    before = log.get_verbosity()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        log.enable_progress_bar()


def _build_imported(source: Source, num_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    factory = import_callable(source)
    if inspect.isbuiltin(factory):  # os.abort, time.time: none of them builds a network, and some end the process
        raise InputError(
            f"--model {source.name} is a function of Python itself; name a class or function that returns an nn.Module"
        )
    if source.pretrained:
        raise InputError(
            f"--pretrained: {source.name} is your own code; load its weights there, or give --weights FILE"
        )
    kwargs = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    with errors_as_sentences(source):
        try:
            network = factory(**(accepted_kwargs(factory, kwargs) | source.options))
        except SystemExit as error:
            raise RuntimeError(f"it ends the process with {error}") from None
    if not isinstance(network, nn.Module):
        raise InputError(f"--model {source.name} returned {type(network).__name__}; it must return an nn.Module")
    if not any(True for _ in network.parameters()):
        raise InputError(f"--model {source.name} returned {type(network).__name__}, which has no parameters to train")
    return network


def accepted_kwargs(function: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return those of `kwargs` that a callable takes; with `**kwargs` among its own, also `num_classes`."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # some classes written in C have no signature
        return {}
    names = {name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
    if len(names) < len(parameters):
        names.add("num_classes")
    return {key: value for key, value in kwargs.items() if key in names}


def import_callable(source: Source) -> Callable[..., nn.Module]:
    """Import `package.module:callable`; modules of the working folder are found too, as with `python -m`."""
    hint = lambda module: (  # noqa: E731
        f"{_suggest_name(module, KINDS)}; give {', '.join(KINDS)} or an importable package.module before the colon"
    )
    return import_object(source.kind, source.path, f"--model {source.name}", hint)
