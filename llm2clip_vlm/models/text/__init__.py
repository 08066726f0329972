"""Text encoders from language models, and the text adaptor."""
