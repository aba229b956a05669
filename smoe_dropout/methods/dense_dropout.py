"""Dense model with ordinary dropout of 0.1, as in the official script of the dense model."""

from smoe_dropout.methods.base import Method

METHOD = Method(
    name="dense_dropout",
    title="Dense, dropout",
    source="arXiv 2303.01610, Table 1",
    sparse=False,
    flags={"moe": False, "dropout": 0.1, "dense_drop": False},
)
