#!/usr/bin/env bash
# Set up and run the tests; arguments go to pytest.
source "$(dirname "$0")/venv.sh" build,openvino,onnxruntime,gpu,plot,tensorrt-rtx,plugin-tests,dev
# A file's tests stay on one worker, which builds what they share once; files in the order of tests/conftest.py.
exec pytest --numprocesses auto --dist loadfile --no-loadscope-reorder "$@"
