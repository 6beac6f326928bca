"""optax chains, schedules and parameter groups."""
