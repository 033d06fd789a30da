"""Run-time decisions, free of any engine: the server and the simulator drive the same objects."""
