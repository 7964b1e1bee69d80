"""Pure functions on tensors: no layers, no models, no options that are not numbers."""
