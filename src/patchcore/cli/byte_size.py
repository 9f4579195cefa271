"""Amounts of memory as they are typed."""

from __future__ import annotations

import re

import click

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


class ByteSize(click.ParamType):
    """A number of bytes: 500MB, 1.5GB, 2GiB, or without a unit."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes, rounded down."""
        found = re.fullmatch(r"([0-9]+)(?:\.([0-9]+))? ?([A-Za-z]*)", str(value).strip())
        if found is None or found[3].upper() not in UNITS:
            self.fail(f"found {value!r}, expected a size such as 500MB, 1.5GB, 2GiB or a number of bytes", param, ctx)
        whole, decimals, unit = found[1], found[2] or "", UNITS[found[3].upper()]
        return int(whole + decimals) * unit // 10 ** len(decimals)  # in integers: 0.1 has no exact float
