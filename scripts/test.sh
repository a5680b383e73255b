#!/usr/bin/env bash
# Set up and run the tests; arguments go to pytest.
source "$(dirname "$0")/venv.sh" build,openvino,onnxruntime,gpu,plot,dev
# A file's tests stay on one worker, which builds what they share once.
exec pytest --numprocesses auto --dist loadfile "$@"
