"""The EMA teacher: its values, update and state, under ZeRO and in a pipeline."""
