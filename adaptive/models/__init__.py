"""Models: assemble layers; none knows training."""
