"""Layers whose work several processes share.

mesh.py         the processes, by the ways in which they share the work
collectives.py  gather, reduce-scatter and all-to-all that gradients pass through
sequence.py     the positions of a row, shared out
ulysses.py      within attention, heads instead of positions
ring.py         keys and values that go round
mixers.py       share_sequence, and what becomes of each kind of mixer
tensor.py       share_layers: heads and neurons, shared out
overlap.py      the same, messages travelling while products are computed
"""
