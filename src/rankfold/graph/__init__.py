"""Contents of a model: the traced program and the sites found in it."""
