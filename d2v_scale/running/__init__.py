"""What every run needs, whatever it trains: the loop, what surrounds it, and what a job does before and after."""
