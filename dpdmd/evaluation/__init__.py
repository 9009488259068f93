"""Measuring a run: the interface of a world, and the reports that are the same in every world."""
