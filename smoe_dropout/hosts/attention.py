"""The attention modules of a host, for methods that route as they attend.

Such a module says by `is_causal` whether a position sees only those before it (one that says nothing: yes). Its probabilities
[B, heads, T, keys] it keeps by itself where it has a switch `keep_probabilities`; those of transformers return them, after their
dropout, with attn_implementation="eager".
"""

from torch import Tensor, nn

from smoe_dropout.config import ConfigError
from smoe_dropout.hosts.site import Site


def attention_before(model: nn.Module, site: Site, probabilities: bool) -> nn.Module:
    """The last attention module ahead of a site. ConfigError if there is none, or it cannot keep the `probabilities` that are wanted."""
    found = None
    for module in model.modules():
        if module is getattr(site.parent, site.name):
            break
        found = module if hasattr(module, "keep_probabilities") or hasattr(module, "is_causal") else found
    if found is None:
        raise ConfigError(f"{type(model).__name__} has no attention module before {site.name!r}, which this method needs")
    if probabilities and not hasattr(found, "keep_probabilities"):
        way = getattr(getattr(found, "config", None), "_attn_implementation", None)
        if way != "eager":
            raise ConfigError(
                f"{type(found).__name__} before {site.name!r} does not give the attention probabilities that this method needs: it is "
                f"computed by {way or 'its own code'!r}; build the model with attn_implementation='eager'"
            )
    return found


def keep_probabilities(attention: nn.Module) -> None:
    """From now on they stand in `attention.probabilities` after every pass."""
    if hasattr(attention, "keep_probabilities"):
        attention.keep_probabilities = True
    else:
        attention.register_forward_hook(_keep_returned)


def _keep_returned(attention: nn.Module, _inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    attention.probabilities = output[1].detach()


def is_causal(attention: nn.Module) -> bool:
    return bool(getattr(attention, "is_causal", True))
