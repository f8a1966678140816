"""Advice on settings, memory, queues and devices, from predictions. One question per file."""
