"""The drawn world: pictures of coloured shapes with captions, questions and conversations."""
