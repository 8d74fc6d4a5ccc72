"""What is fast, measured against what a user would write.

question                                    files
how fast are the flat ops?                  flat (GPU), test_flat and conftest (CPU, pytest-benchmark)
and the ops on the factors of a layer?      layers (GPU), routes (CPU, and the constants of the cost model)
what does a whole step cost?                steps (CPU), steps_cuda (GPU); models and contenders: of what, and of whom
do all kernels compile, and touch only      aot, specialisations; sanitize
what is theirs?
which settings do methods get, and did      tune, compare_results
their results change?
what do the documents say of all this?      readme

`harness` measures, `report` writes rows and pictures, `command` holds what the commands share, `machine` says what is
installed here. `gpu.sh` runs what needs a GPU. What was measured is kept in results/.
"""
