"""Which layers of which request's KV live on the device. Knows neither torch nor sglang."""
