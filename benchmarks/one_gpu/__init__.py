"""One GPU, ten minutes: what `bash launch/one_gpu.sh` runs (`__main__.py` describes it)."""
