"""Values that several layers agree on."""

IGNORE_INDEX = -100
"""Label of a token that takes no part in the loss (the default of `torch.nn.CrossEntropyLoss`)."""

IMAGE_TOKEN = "<image>"
"""Placeholder for one image in a conversation and the name of the token that stands for it."""

MANIFEST_NAME = "manifest.json"
"""File that a finished stage leaves in its output directory."""

SEAL_NAME = "files.json"
"""File that makes a checkpoint whole: processes that wrote it, and sha256 of each of its files."""

STOPPED = "stopped by SIGTERM"
"""What a stage prints when a signal ended it after a checkpoint, with exit code 0."""
