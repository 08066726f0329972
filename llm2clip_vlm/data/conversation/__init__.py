"""Conversations with pictures: messages, samples, packed rows."""
