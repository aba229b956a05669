"""The dense model with ordinary dropout of 0.1, which is what the official script of the dense model trains."""

from smoe_dropout.methods.base import DENSE, Method

METHOD = Method(
    name="dense_dropout",
    title="Dense, dropout",
    source="arXiv 2303.01610, Table 1",
    sparse=False,
    flags={**DENSE, "dropout": 0.1},
)
