"""Files on disk: checkpoints, and work that was interrupted."""
