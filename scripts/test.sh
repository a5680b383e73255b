#!/usr/bin/env bash
# Set up and run the tests; arguments go to pytest.
source "$(dirname "$0")/venv.sh" build,openvino,onnxruntime,plot,dev
exec pytest "$@"
