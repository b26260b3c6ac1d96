"""The losses side by side with what else is installed: `python -m megapd_kernels.benchmark --help`."""
