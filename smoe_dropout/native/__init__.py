"""Mixture-of-experts blocks that a model has of its own, such as those of Mixtral, and their adoption as MoE layers.

Found by structure, and recognised by numbers: a block is adopted if an MoE layer computes the same on random inputs.
"""

from smoe_dropout.native.blocks import native_blocks

__all__ = ["native_blocks"]
