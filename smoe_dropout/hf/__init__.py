"""Integration with the transformers library."""
