"""Attention modules of a model, for methods that route by attention.

An attention module has `is_causal`, whether a position attends only to earlier ones (default: yes). It keeps its probabilities
[B, heads, T, keys] if it has a switch `keep_probabilities`; those of transformers return them, after dropout, with
attn_implementation="eager".
"""

from torch import Tensor, nn

from smoe_dropout.hosts.site import Site
from smoe_dropout.options import ConfigError


def attention_before(model: nn.Module, site: Site, probabilities: bool) -> nn.Module:
    """The last attention module before a site. ConfigError if there is none, or if it cannot provide `probabilities` when required."""
    found = None
    for module in model.modules():
        if module is getattr(site.parent, site.name):
            break
        found = module if hasattr(module, "keep_probabilities") or hasattr(module, "is_causal") else found
    if found is None:
        raise ConfigError(f"{type(model).__name__} has no attention module before {site.name!r}, which this method needs")
    if probabilities and not hasattr(found, "keep_probabilities"):
        implementation = getattr(getattr(found, "config", None), "_attn_implementation", None)
        if implementation != "eager":
            raise ConfigError(
                f"{type(found).__name__} before {site.name!r} does not return the attention probabilities that this method needs: it uses "
                f"the implementation {implementation or 'of its own code'!r}; build the model with attn_implementation='eager'"
            )
    return found


def keep_probabilities(attention: nn.Module) -> None:
    """Make the module keep the probabilities of every pass in `attention.probabilities`."""
    if hasattr(attention, "keep_probabilities"):
        attention.keep_probabilities = True
    else:
        attention.register_forward_hook(_keep_returned)


def _keep_returned(attention: nn.Module, _inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    attention.probabilities = output[1].detach()


def is_causal(attention: nn.Module) -> bool:
    """Whether a position attends only to itself and earlier ones."""
    return bool(getattr(attention, "is_causal", True))
