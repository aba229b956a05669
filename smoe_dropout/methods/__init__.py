"""Training methods: one file each, which can be deleted, and one line in `registry.METHODS`."""
