"""Arrays of any kind, along one to four axes."""
