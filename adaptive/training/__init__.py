"""Train state and step, and the parts of the loop around it."""
