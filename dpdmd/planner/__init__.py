"""Memory and speed of a configuration, before anything is loaded; and the choice of `auto`."""
