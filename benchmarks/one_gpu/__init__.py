"""Ten minutes on one GPU: what `bash launch/one_gpu.sh` runs (see `__main__.py`)."""
