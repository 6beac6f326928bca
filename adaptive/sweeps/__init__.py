"""What studies share: runs that are made once, fits of losses, pictures and pages."""
