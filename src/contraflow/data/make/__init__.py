"""Datasets of benchmarks, made on this machine by the scripted controllers that their packages bring along."""
