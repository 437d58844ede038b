"""The training loop of tune passes and what belongs to it: losses, adapters, augmentation, several processes."""
