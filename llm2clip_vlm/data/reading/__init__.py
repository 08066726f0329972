"""Files, archives, tables and pictures of others: read, or refused by name."""
