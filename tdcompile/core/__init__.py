"""The contracts: plug-ins and their registry, passes and their pipeline."""
