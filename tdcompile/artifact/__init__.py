"""What is written to disk and read back: the artefact folder, checkpoints, the report."""
