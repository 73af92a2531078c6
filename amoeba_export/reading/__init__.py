"""How files that we did not write are read: sizes, depths and numbers are bounded here, once for all readers."""

from amoeba_export.reading.bounds import MAX_NAME_BYTES, dim_problems, is_name_too_long
from amoeba_export.reading.decode import WrongValue, decode
from amoeba_export.reading.json_object import as_json, check_schema, parse_json_object, read_json_object
from amoeba_export.reading.panics import panics_as_errors
from amoeba_export.reading.toml_table import parse_toml, read_toml

__all__ = [
    "MAX_NAME_BYTES",
    "WrongValue",
    "as_json",
    "check_schema",
    "decode",
    "dim_problems",
    "is_name_too_long",
    "panics_as_errors",
    "parse_json_object",
    "parse_toml",
    "read_json_object",
    "read_toml",
]
