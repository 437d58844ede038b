"""Decompositions: each replaces one layer by a chain of small layers."""
