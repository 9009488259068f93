"""How things are measured, whatever they are: operations, their check, time, profile, tables and pictures."""
