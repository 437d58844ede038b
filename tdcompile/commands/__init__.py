"""What stands behind the command's words: options, messages, and one file for each family of commands."""
