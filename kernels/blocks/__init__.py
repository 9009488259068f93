"""The operations of a transformer's block."""
