"""Files that are not on this machine: found, read by range, kept for a while."""
