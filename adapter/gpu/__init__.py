"""GPUs through NVIDIA's driver. Importable without it: the bindings are imported where they are used."""
