"""Measuring: what a method costs and what it keeps."""
