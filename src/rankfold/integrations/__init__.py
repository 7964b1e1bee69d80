"""Other libraries' ways to load and save."""
