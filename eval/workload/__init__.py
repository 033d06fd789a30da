"""Requests to serve: their lengths, when they come, and what they were promised."""
