"""What one process hears and says."""
