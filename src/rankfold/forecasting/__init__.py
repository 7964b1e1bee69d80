"""What a compression will take and can reach, before it is run."""
