"""Scores: each says how much errors in a layer harm the network."""
