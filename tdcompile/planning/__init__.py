"""Prices, rank choice under a budget, and given plans."""
