"""Replicas of an engine in processes of their own, which pull rows from one queue."""
