"""Every key of every recipe; reading, merging and checking them."""
