"""What is kept on disk: checkpoints, and work that was interrupted."""
