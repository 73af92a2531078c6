"""The application: what one export is, from a request to a published artifact. `pipeline` is the whole job as one list.

The room is not called `export`, since `amoeba_export.export` is the function that users call.
"""
