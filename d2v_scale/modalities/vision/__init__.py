"""Images: squares cut into patches."""
