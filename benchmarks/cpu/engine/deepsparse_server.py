"""DeepSparse on one network, in an environment of its own; served.py starts this, and says how to make that.

ENV/bin/python -I deepsparse_server.py MODEL.onnx INPUT.npy OUTPUT.npy THREADS

Writes the output and answers "ready VERSION"; then each line on stdin, a number of seconds, is a burst of
calls, and the answer the median seconds of one. By then its threads sleep. Ends with stdin.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# turns.py by itself: the package that it is of needs torch
sys.path.append(str(Path(__file__).resolve().parents[3] / "python/drive/experiments/bench"))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries print is no answer
    import deepsparse
    import numpy
    from turns import burst, wait_until_idle

    model, source, target, threads = sys.argv[1:]
    inputs = numpy.load(source)
    engine = deepsparse.Engine(model, batch_size=len(inputs), num_cores=int(threads))
    numpy.save(target, engine.run([inputs])[0])
    print("ready", deepsparse.__version__, file=answers)
    calls = burst(lambda: engine.run([inputs], val_inp=False))
    for line in sys.stdin:
        seconds = calls(float(line))
        wait_until_idle()
        print(seconds, file=answers)


if __name__ == "__main__":
    main()
