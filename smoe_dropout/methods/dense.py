"""Dense model without dropout: the width of its FFN is that of all experts together."""

from smoe_dropout.methods.base import DENSE, Method

METHOD = Method(
    name="dense",
    title="Dense",
    source="arXiv 2303.01610, Table 1",
    sparse=False,
    flags=DENSE,
    baseline=True,
)
