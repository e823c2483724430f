"""Helpers around particular kinds of models."""
