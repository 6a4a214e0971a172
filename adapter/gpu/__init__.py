"""GPUs: what is there, what works on it, filling its memory, and giving that back while the process stays.

Part of the shim: standard library only until a GPU is touched, and that never in the entrypoint itself but in
the helper process (`helper`), which holds the initialised driver and may hang or die without harm, and in the
model process, which streams its weights (`stream`).
"""
