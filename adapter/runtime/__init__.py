"""The shim in function images: the entrypoint (PID 1) and the model process."""
