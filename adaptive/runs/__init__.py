"""What training, inference and conversion all read: the folder of a run, its checkpoints and its state."""
