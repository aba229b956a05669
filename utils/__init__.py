"""The experiment harness around the `smoe_dropout` library: flags, data, checkpoints, evaluation, records, reports."""
