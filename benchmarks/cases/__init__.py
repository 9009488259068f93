"""What is measured, a file for each subject. Whole transformers (transformer.py) and cycles (cycle.py) are chosen by
parts of their own; of the other operations this is the list, and an operation is an entry of its subject's file."""

from cases import adamw, attention, blocks, losses

OPERATIONS = {
    each.name: each for each in (*losses.OPERATIONS, *blocks.OPERATIONS, *attention.OPERATIONS, *adamw.OPERATIONS)
}
