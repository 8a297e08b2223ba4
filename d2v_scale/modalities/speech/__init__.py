"""Recordings: 16 kHz waveforms to 20 ms frames."""
