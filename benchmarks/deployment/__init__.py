"""Exported networks: are they the networks that were trained, how fast and how large are they?"""
