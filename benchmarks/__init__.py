"""Measurements that print JSON: ratios within one process, never a timed test."""
