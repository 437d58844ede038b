"""Plug-ins: see the folder map in the README."""
