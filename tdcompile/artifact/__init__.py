"""Files on disk: the artefact folder, checkpoints and the report."""
