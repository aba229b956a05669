"""Training methods: one deletable file each, and one line in `registry.METHODS`."""
