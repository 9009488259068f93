"""The shipped worlds. Each is a folder, named as the world, with evaluation.py and its EVALUATION (evaluation/protocol.py has
the interface) and, if model.pipeline may name it too, a small teacher in teacher/."""
