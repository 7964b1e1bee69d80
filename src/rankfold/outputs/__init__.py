"""What the outputs of a model are, and what a change of them means."""
