"""The formats below a checkpoint: OCDBT stores, Orbax's metadata, TensorStore specs."""
