"""Layers whose work several processes share.

collectives.py  gather, reduce-scatter and all-to-all that gradients pass through
sequence.py     the positions of a row, shared out
"""
