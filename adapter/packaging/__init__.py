"""From a function folder to an image: what a builder does, without a GPU and without running a replica."""
