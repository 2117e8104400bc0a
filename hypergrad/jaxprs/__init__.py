"""What a function does with its inputs, read from its jaxpr."""
