"""Plan + model → model with other layers in place."""
