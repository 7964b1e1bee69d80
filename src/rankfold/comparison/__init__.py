"""Original against compressed, on data."""
