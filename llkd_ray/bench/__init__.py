"""Latency, throughput and cost of an endpoint, measured from outside over HTTP."""
