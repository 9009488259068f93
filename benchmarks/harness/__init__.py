"""The parts that all measurements share: operations, checks, timing, profile, tables and pictures."""
