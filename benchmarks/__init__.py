"""What the library is measured on. Nothing here is part of the package."""
