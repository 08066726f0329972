"""Models, how they are loaded, trained in part, and saved."""
