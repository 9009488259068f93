"""Optimizer steps that go over memory once."""
