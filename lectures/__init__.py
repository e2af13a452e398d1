"""Lectures: numbered scripts that explain and run, and papers.tsv, the index of papers. `python -m lectures` lists them."""
