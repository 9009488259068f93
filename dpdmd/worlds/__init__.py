"""The worlds that ship. Each is a folder whose name stands for it: evaluation.py with an EVALUATION (evaluation/protocol.py says
what that is), and, where model.pipeline may name it too, a small teacher in teacher/."""
