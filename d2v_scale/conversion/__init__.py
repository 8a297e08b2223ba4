"""From files and documents to shards, and what can be read of those that there are."""
