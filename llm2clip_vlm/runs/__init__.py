"""What a run leaves and holds: manifest, hashes, owner, lock."""
