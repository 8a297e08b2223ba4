"""Images, cut into square patches."""
