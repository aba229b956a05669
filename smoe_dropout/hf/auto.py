"""Converted models for transformers' auto classes: the configuration class behind the model type of this library.

`import smoe_dropout` registers it, before or after transformers is imported, and so does the module in a saved folder that transformers
imports with trust_remote_code=True. Importing this module imports transformers, but not torch.
"""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from smoe_dropout.hf.described import NAME, read


class ConfigWithExperts(PreTrainedConfig):
    """Reader of config.json of a converted model: gives the host's configuration, which also describes the experts."""

    model_type = NAME

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The host's configuration, changed by `kwargs` as in PreTrainedConfig. ConfigError for contents that describe no model."""
        return read(config_dict, **kwargs)


CONFIG_MAPPING.register(NAME, ConfigWithExperts, exist_ok=True)
