"""Speed on a CPU, as ratios measured in one process: python -m benchmarks {layer,step,data}. README.md embeds `tables.markdown`."""
