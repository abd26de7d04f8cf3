"""Networks from elsewhere: `timm:NAME`, `torchvision:NAME`, `hf:PATH`, `package.module:callable`.

Options follow the name after commas, as Python values: `torchvision:mobilenet_v2,width_mult=0.5`. The libraries are
imported when a name asks for them. A `Source` is a callable that builds one network for so many classes, channels and
pixels; weights, where they are asked for, go everywhere but into the classifier head.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from codistill.utils.allow_import import current_network_name
from codistill.utils.errors import InputError
from codistill.utils.safe_load import load_tensors

KINDS = {
    "timm": "timm:NAME[,OPTION=VALUE ...]",
    "torchvision": "torchvision:NAME[,OPTION=VALUE ...]",
    "hf": "hf:PATH (a transformers image classifier)",
}
EXTERNAL_MODELS = {
    "timm:NAME": "any classifier of timm (pip install 'codistill[timm]')",
    "torchvision:NAME": "any classifier of torchvision; takes 3 channels",
    "hf:PATH": "an image classifier of transformers (pip install 'codistill[transformers]')",
    "package.module:callable": "your own code; called with num_classes, in_channels, image_size, if it takes them",
}
# Auxiliary classifiers would make these return tuples while they train.
_TORCHVISION_DEFAULTS = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


@dataclass
class Source:
    """Builds the network behind a name from elsewhere."""

    name: str
    """The whole name, as the user gave it."""
    kind: str
    path: str
    """What stands between the kind and the options."""
    options: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False

    @property
    def is_library(self) -> bool:
        """Whether a library made the network, and not the user."""
        return self.kind in KINDS

    @property
    def native_size(self) -> int | None:
        """Side of the images that the network was made for; None where it follows the images that it is built for."""
        if self.kind == "torchvision":
            return None if self.path.startswith("vit_") else 299 if self.path == "inception_v3" else 224
        if self.kind == "timm" and not self.path.startswith("local-dir:"):
            about = _library(self, "timm").get_pretrained_cfg(self.path)
            return None if about is None or about.fixed_input_size else about.input_size[-1]
        return None

    def __call__(self, num_classes: int = 1000, in_channels: int = 3, image_size: int | None = None) -> nn.Module:
        """Build one network.

        Raises:
            InputError: the library is missing, or does not know the name, an option or the weights.
        """
        build = {"timm": _timm, "torchvision": _torchvision, "hf": _hf}.get(self.kind, _imported)
        return build(self, num_classes, in_channels, image_size)


def parse_source(name: str, pretrained: bool = False) -> Source | None:
    """Read a name from elsewhere; None where it is none (it has no colon)."""
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
            raise InputError(f'--model {name}: "{pair}" is no option; write OPTION=VALUE after a comma')
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return Source(name, kind, path, options, pretrained)


def takes_colour_alone(name: str, pretrained: bool) -> bool:
    """Say whether a network takes 3 channels only, so that gray images are repeated into them."""
    kind = name.partition(":")[0] if ":" in name else ""
    return kind == "torchvision" or (kind == "hf" and pretrained)


def pretrained_statistics(names: Iterable[str]) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]] | None]:
    """Return, for each network, mean and deviation of the images that its weights were trained on; None: unknown."""
    found: dict[str, tuple[tuple[float, ...], tuple[float, ...]] | None] = {}
    for name in names:
        source = parse_source(name, pretrained=True)
        about: Any = None
        if source is not None and source.kind == "timm" and not source.path.startswith("local-dir:"):
            about = _library(source, "timm").get_pretrained_cfg(source.path)
        elif source is not None and source.kind == "torchvision":
            from torchvision import models

            known = source.path in models.list_models(module=models)
            about = models.get_model_weights(source.path).DEFAULT.transforms() if known else None  # pyrefly: ignore
        elif source is not None and source.kind == "hf":
            about = _hf_preprocessing(source)
        found[name] = None if about is None else (tuple(about.mean), tuple(about.std))
    return found


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, [*known], n=1, cutoff=0.6)
    return f' (did you mean "{near[0]}"?)' if near else ""


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def errors_as_sentences(source: Source) -> Iterator[None]:
    """Turn what a library meets while it builds into one sentence."""
    try:
        yield
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"--model {source.name}: {_first_line(error)}") from error
    except Exception as error:  # the libraries raise whatever their constructors or downloads meet
        reason = _first_line(error).rstrip(".")
        if source.pretrained:
            raise InputError(
                f"--pretrained: the weights of {source.name} are not on this machine and cannot be downloaded, or do "
                f"not fit ({reason}); leave --pretrained out, or name a file with --weights"
            ) from error
        raise InputError(f"--model {source.name} cannot be built ({reason}); mend its name or options") from error


def _library(source: Source, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        extra = {"hf": "transformers"}.get(source.kind, source.kind)
        raise InputError(f"--model {source.name} needs: pip install 'codistill[{extra}]'") from None


def _timm(source: Source, num_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    timm = _library(source, "timm")
    local = source.path.startswith("local-dir:")
    if not local and not timm.is_model(source.path.partition(".")[0]):
        raise InputError(f'--model {source.name}: timm has no "{source.path}"{_near(source.path, timm.list_models())}')
    about = None if local else timm.get_pretrained_cfg(source.path)
    if about is not None and about.fixed_input_size and image_size not in (None, about.input_size[-1]):
        source = Source(
            source.name, source.kind, source.path, {"img_size": image_size} | source.options, source.pretrained
        )
    with errors_as_sentences(source):
        return timm.create_model(
            source.path, pretrained=source.pretrained, num_classes=num_classes, in_chans=in_channels, **source.options
        )


def _torchvision(source: Source, num_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if source.path not in known:
        raise InputError(f'--model {source.name}: torchvision has no "{source.path}"{_near(source.path, known)}')
    if in_channels != 3:
        raise InputError(f"--model {source.name} takes 3 channels, not {in_channels}; leave --channels out or give 3")
    options = _TORCHVISION_DEFAULTS.get(source.path, {}) | source.options
    if source.path.startswith("vit_") and image_size is not None:
        options = {"image_size": image_size} | options
    with errors_as_sentences(source):
        if not source.pretrained:
            return models.get_model(source.path, weights=None, num_classes=num_classes, **options)
        network = models.get_model(source.path, weights=None, num_classes=num_classes, **options)
        state = models.get_model_weights(source.path).DEFAULT.get_state_dict(progress=False, check_hash=True)  # pyrefly: ignore
        return fill(network, dict(state), f"--pretrained {source.path}")


class LogitsOnly(nn.Module):
    """A transformers classifier whose output is its logits, as everybody else's is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the logits, `B x C`."""
        return self.model(pixel_values=x_BCHW).logits


def _hf(source: Source, num_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    transformers = _library(source, "transformers")
    with errors_as_sentences(source):
        about = transformers.AutoConfig.from_pretrained(source.path, **source.options)
        about.num_labels = num_classes
        classifier = transformers.AutoModelForImageClassification
        if source.pretrained:
            if in_channels != 3:
                raise InputError(f"--pretrained {source.name} takes 3 channels; leave --channels out or give 3")
            with _quiet(transformers):
                loaded = classifier.from_pretrained(source.path, config=about, ignore_mismatched_sizes=True)
            return LogitsOnly(loaded)
        if hasattr(about, "num_channels"):
            about.num_channels = in_channels
        if hasattr(about, "image_size") and image_size is not None:
            about.image_size = image_size
        return LogitsOnly(classifier.from_config(about))


def _hf_preprocessing(source: Source) -> Any:
    """Return what the folder or the Hub says of the images; None where nothing is said."""
    transformers = _library(source, "transformers")
    try:
        found, _ = transformers.image_processing_utils.ImageProcessingMixin.get_image_processor_dict(source.path)
    except OSError:  # there is no such file, or no network
        return None
    if "image_mean" not in found or "image_std" not in found:
        return None
    return SimpleNamespace(mean=found["image_mean"], std=found["image_std"])


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep transformers from telling of the new head, which is what was asked for."""
    log = transformers.utils.logging
    before = log.get_verbosity()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        log.enable_progress_bar()


def _imported(source: Source, num_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    factory = imported_callable(source)
    if source.pretrained:
        raise InputError(
            f"--pretrained: {source.name} is code of yours; load its weights there, or give --weights FILE"
        )
    offers = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    accepted = inspect.signature(factory).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    taken = {key: value for key, value in offers.items() if key in accepted or (open_ended and key == "num_classes")}
    with errors_as_sentences(source):
        network = factory(**(taken | source.options))
    if not isinstance(network, nn.Module):
        raise InputError(f"--model {source.name} returned {type(network).__name__}; it must return an nn.Module")
    return network


def imported_callable(source: Source) -> Callable[..., nn.Module]:
    """Import `package.module:callable`; the working folder counts as a place to look in, as with `python -m`."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(source.kind)
    except ModuleNotFoundError as error:
        if error.name is not None and not (source.kind + ".").startswith(error.name + "."):
            raise InputError(
                f"--model {source.name}: {source.kind} needs {error.name}, which is not installed"
            ) from None
        raise InputError(
            f'--model {source.name}: there is no module "{source.kind}"{_near(source.kind, KINDS)}; give '
            f"{', '.join(KINDS)} or an importable package.module before the colon"
        ) from None
    finally:
        sys.path.remove(folder)
    factory = getattr(module, source.path, None)
    if not callable(factory):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise InputError(
            f'--model {source.name}: {source.kind} has no callable "{source.path}"{_near(source.path, names)}'
        )
    return factory


def fill(network: nn.Module, state: dict[str, Tensor], flag: str) -> nn.Module:
    """Load weights into a network; the last layer may end in another number of classes, and then stays new.

    Raises:
        InputError: something else than the head is missing, superfluous or of another shape.
    """
    ours = network.state_dict()
    ending = {k for k in (*ours, *state) if _is_end(network, k, ours, state)}
    wrong = [k for k in (*ours, *state) if k not in ending and (k not in ours or k not in state)]
    shapes = [k for k in ours if k in state and k not in ending and ours[k].shape != state[k].shape]
    wrong = [k for k in wrong if not k.startswith(("aux", "AuxLogits")) and not k.endswith("num_batches_tracked")]
    if wrong or shapes:
        key = (wrong or shapes)[0]
        what = (
            f"shapes {tuple(state[key].shape)} and {tuple(ours[key].shape)}"
            if key in ours and key in state
            else ("the file lacks it" if key in ours else "the network has no such weight")
        )
        raise InputError(f"{flag} does not fit the network at {key} ({what}); name the network that was trained")
    network.load_state_dict({k: v for k, v in state.items() if k in ours and k not in ending}, strict=False)
    return network


def _is_end(network: nn.Module, key: str, ours: dict[str, Tensor], state: dict[str, Tensor]) -> bool:
    """Say whether `key` belongs to a linear layer whose number of outputs alone differs: the classifier."""
    if key not in ours or key not in state or ours[key].shape == state[key].shape:
        return False
    return (
        isinstance(network.get_submodule(key.rpartition(".")[0]), nn.Linear)
        and ours[key].shape[1:] == state[key].shape[1:]
    )


def read_weights(path: str) -> dict[str, Tensor]:
    """Read a file of weights: .safetensors, or a state dict that torch saved; no code in it is run.

    Raises:
        InputError: the file is missing, damaged or holds no weights.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"--weights {path} does not exist; name a .safetensors file or a saved state dict")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        state = load_tensors(file)
    except Exception as error:  # a damaged file fails in many ways
        raise InputError(f"--weights {path} cannot be read ({_first_line(error)})") from None
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"--weights {path} holds no state dict; save model.state_dict()")
    return state
