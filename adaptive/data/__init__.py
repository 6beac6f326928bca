"""Sources, tokenizers, packing, grain pipelines and synthetic tasks."""
