"""Quantization: the arithmetic behind the technique of that name, on ONNX graphs and numpy arrays.

It knows no technique, no search and no task: which parameters are good is found by measuring.
"""
