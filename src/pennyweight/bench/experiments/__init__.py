"""The experiment behind each card: `python -m pennyweight.bench.experiments.NAME` writes its docs/results page."""
