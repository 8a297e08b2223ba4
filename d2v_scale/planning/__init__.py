"""What a run will cost, on paper: FLOPs, bytes, traffic and time, before anything is allocated."""
