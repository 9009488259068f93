"""The losses of distillation, each with the gradient that it computes along the way."""
