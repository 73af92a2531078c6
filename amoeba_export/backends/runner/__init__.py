"""The runner: opens models, times them in turns, and says what the device is. Local and sent by `ssh` alike.

It is self-contained: nothing but the standard library, numpy and the runtime that it measures (Python 3.8 or later).
The same files, zipped, run on a device where amoeba is not installed: hence no import from the rest of amoeba here.

A job is a JSON object: `engine` and its `options`, `workload`, `rounds`, `time_limit_s`, and `subjects`, each with an
`id`, a `folder`, the `memory_mb` that it may take, and what its engine wants to know of it. Events come back as one
JSON object per line; see `supervise`.
"""
