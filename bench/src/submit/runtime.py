"""Runs an ONNX model in ONNX Runtime's own Python package: the bare thing that `mesh-bench submit` compares with.

usage: python runtime.py MODEL

Prints the nanoseconds from before the library is loaded until the first answer. From then on, a line with a number on
standard input asks for as many runs, and a line with the nanoseconds of each is the answer. Times are measured around
the call, so neither the pipes nor the start of Python is part of them.
"""

import sys
import time

import numpy


def main(model):
    x, expected = numpy.array([1, 2, 3, 4], numpy.float32), [2, 3, 4, 5]
    start = time.perf_counter_ns()
    import onnxruntime

    # As in the runner.
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(start):
        (y,) = session.run(None, {"x": x})
        took = time.perf_counter_ns() - start
        assert y.tolist() == expected, y
        return took

    print(run(start), flush=True)
    for line in sys.stdin:
        print(*(run(time.perf_counter_ns()) for _ in range(int(line))), flush=True)


main(sys.argv[1])
