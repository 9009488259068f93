"""Steps along a path between noise and data."""
