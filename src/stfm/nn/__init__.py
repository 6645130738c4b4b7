"""Building blocks of the models: tensors in, tensors out; no slides, no AnnData."""
