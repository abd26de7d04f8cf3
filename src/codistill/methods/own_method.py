"""Methods that users write: what they lack is said in one sentence, before the first step or in it."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from codistill.config import MethodConfig
from codistill.methods.base import OUTPUTS_BY_NEED, Method, PeerInfo
from codistill.utils import InputError

NEEDS = frozenset({"views", "holdout", "previous", "rotations", *OUTPUTS_BY_NEED})


def build_own_method(config: MethodConfig, info: PeerInfo) -> Method:
    """Build the method of a user's `Config`.

    Raises:
        InputError: the class, its `Config` or what its `__init__` sets is not complete.
    """
    own: type[Method] | None = config.method_class
    if own is None:
        raise InputError(f"{type(config).__name__} belongs to no method; set it as `Config` on the method's class")
    own.config_class()
    _check_signatures(own, config, info)
    method = own.build(config, info)
    if not isinstance(method, Method):
        raise InputError(f"method {config.import_name}: `build` must return the method, not {type(method).__name__}")
    if "_parameters" not in vars(method) or not hasattr(method, "needs"):
        raise InputError(f"method {config.import_name}: its `__init__` must begin with super().__init__(num_peers)")
    _check_needs(method, config)
    _check_fields(method)
    _check_first_terms(method)
    return method


def _check_signatures(own: type[Method], config: MethodConfig, info: PeerInfo) -> None:
    """Check that `__init__` takes the options, where `build` passes them, and that `forward` can be called."""
    where = f"method {config.import_name}"
    if getattr(own.build, "__func__", None) is getattr(Method.build, "__func__", None):
        try:
            inspect.signature(own).bind(num_peers=info.num_peers, **dataclasses.asdict(config))
        except TypeError as error:
            raise InputError(
                f"{where}: its `__init__` must take num_peers and every option of its Config ({error})"
            ) from None
    try:
        inspect.signature(own.forward).bind(own, "outputs", "targets_B", 1.0)
    except TypeError as error:
        raise InputError(f"{where}: `forward` must take (outputs, targets_B, weight) ({error})") from None


def _check_needs(method: Method, config: MethodConfig) -> None:
    """Check that the method asks for what exists, and that its `Config` asks for it where the networks depend on it."""
    start = f"method {method.name}"
    if isinstance(method.needs, str):
        raise InputError(f"{start}: self.needs is text; give a set, as in frozenset({{{method.needs!r}}})")
    method.needs = frozenset(method.needs)
    if unknown := sorted(map(str, method.needs - NEEDS)):
        raise InputError(f"{start} needs {', '.join(unknown)}; it may need {', '.join(sorted(NEEDS))}")
    for need, count in (("exits", config.num_exits()), ("maps", config.num_maps())):
        if need in method.needs and not count:
            raise InputError(f"{start} needs {need}; let `num_{need}` of its Config return how many of each network")
    if "holdout" in method.needs and not (config.needs_holdout() and getattr(config, "holdout_fraction", 0.0)):
        raise InputError(
            f"{start} needs a holdout; let `needs_holdout` of its Config return True, and give it an option "
            "holdout_fraction, as in 0.05"
        )


def _check_fields(method: Method) -> None:
    """Check what `__init__` may have set: who is deployed, who is in the ensemble, how the members are updated."""
    start, count = f"method {method.name}", method.num_peers
    if method.deployed not in range(count):
        raise InputError(f"{start}: self.deployed is {method.deployed}; give the number of a peer, 0 to {count - 1}")
    if not method.group or any(p not in range(count) for p in method.group):
        raise InputError(f"{start}: self.group is {method.group}; give numbers of peers, 0 to {count - 1}")
    if method.update_mode not in ("joint", "alternating"):
        raise InputError(f'{start}: self.update_mode is "{method.update_mode}"; give "joint" or "alternating"')


def _check_first_terms(method: Method) -> None:
    """Let a method check the terms that its `forward` returns, in its first call only."""

    def check(_module: nn.Module, _inputs: Any, terms: Any) -> None:
        handle.remove()
        _check_terms(method, terms)

    handle = method.register_forward_hook(check)


def _check_terms(method: Method, terms: Any) -> None:
    """Raise InputError if the terms are not what the training loop expects of them."""
    start, count = f"method {method.name}: forward must return a dict of tensors", method.num_peers
    if not isinstance(terms, dict) or not all(isinstance(value, Tensor) for value in terms.values()):
        kind = "other values in it" if isinstance(terms, dict) else type(terms).__name__
        raise InputError(f"{start}, not {kind}; combine_terms makes it")
    shapes: dict[str, tuple[int, ...]] = {"loss": (), "loss_P": (count,), "ce_P": (count,), "distill_P": (count,)}
    if missing := [name for name in shapes if name not in terms]:
        raise InputError(f"{start} with {', '.join(shapes)}; {', '.join(missing)} is missing; combine_terms makes it")
    if method.pauses_members:
        shapes["active_P"] = (count,)
        if "active_P" not in terms:
            raise InputError(f"{start} with active_P, as it sets pauses_members: who steps, one boolean a peer")
    for name, shape in shapes.items():
        if tuple(terms[name].shape) != shape:
            wanted = f"one number a peer, {count}" if shape else "one number"
            raise InputError(f"method {method.name}: {name} has the shape {tuple(terms[name].shape)}; give {wanted}")
    if torch.is_grad_enabled() and not (terms["loss"].requires_grad and terms["loss_P"].requires_grad):
        raise InputError(f"method {method.name}: its loss has no gradient; compute it from logits_PBC, not detached")
