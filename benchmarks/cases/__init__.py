"""The measured operations, a file for each subject. Whole transformers (transformer.py) and cycles (cycle.py) are not in this
list: run.py calls them directly."""

from cases import adamw, attention, blocks, losses

OPERATIONS = {
    each.name: each for each in (*losses.OPERATIONS, *blocks.OPERATIONS, *attention.OPERATIONS, *adamw.OPERATIONS)
}
