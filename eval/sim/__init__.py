"""A server in simulated time: the real controller and planner over modelled hardware."""
