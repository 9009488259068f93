"""Measuring a run: what a world has to bring, and all that is of no world."""
