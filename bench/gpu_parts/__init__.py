"""What `rt.bench.gpu` measures, one file a part, and how parts are run and kept."""
