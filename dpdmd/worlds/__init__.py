"""The worlds that ship: a small teacher each, captioned pictures, and exact measurements of them."""
