"""What measured losses say about sizes not trained yet: laws with their fits.

speedup.py    how much less compute a mixture needs than dense models for the same loss
routed.py     the loss of a mixture by its size and the number of its experts
"""
