"""Layers: one concept a file, made of the operations in kernels/. Each family folder is a table of contents."""
