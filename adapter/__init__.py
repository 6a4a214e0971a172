"""gpufn: GPU functions inside the FaaS frameworks teams already run.

This module imports nothing: it is loaded in every function image.
"""

__version__ = "0.1.0"
