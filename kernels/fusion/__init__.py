"""The operations put in the place of a diffusers transformer's own, and what its checkpoints keep."""
