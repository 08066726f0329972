"""Chat templates: conversations to token ids and labels."""
