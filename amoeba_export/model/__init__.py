"""The model layer by layer: single layers, their streams of hidden states, and the samples that flow through them.

A low room that every stage may use: calibration, evaluation and recovery run the same layers.
"""
