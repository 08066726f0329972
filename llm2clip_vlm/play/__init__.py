"""Playing with finished models: a chat, a search in photographs, and a page with both."""
