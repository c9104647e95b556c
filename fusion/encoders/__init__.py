"""Encoders of one modality: time series, images."""
