"""What an attached model runs in place of its own methods."""
