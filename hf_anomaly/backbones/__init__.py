"""Encoders of the package's own; any other `AutoBackbone` serves as well."""
