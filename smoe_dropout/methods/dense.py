"""The dense model without dropout: an FFN of the width that the experts have together."""

from smoe_dropout.methods.base import DENSE, Method

METHOD = Method(
    name="dense",
    title="Dense",
    source="arXiv 2303.01610, Table 1",
    sparse=False,
    flags=DENSE,
)
