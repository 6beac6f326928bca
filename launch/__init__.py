"""Starting one training run over several processes or machines; each starts the same `python -m adaptive.train`."""
