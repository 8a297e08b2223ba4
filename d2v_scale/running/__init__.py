"""What every run needs, whatever it trains: the loop."""
