"""Rank choice and prices."""
